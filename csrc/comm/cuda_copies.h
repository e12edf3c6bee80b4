#pragma once

#include <memory>

#include "comm/copy_calls.h"

namespace dualpipe {

// The copy engines of one GPU of this process. Ranks that are processes share memory through CUDA
// IPC, ranks that are threads directly. Throws UserError if the GPU or its driver lacks what is
// needed.
[[nodiscard]] std::shared_ptr<CopyCalls> cuda_copies(int device);

}  // namespace dualpipe
