#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "comm/copy_calls.h"

namespace dualpipe {

// Issues several copies in one call, with the hint to use a copy engine even within one GPU, where
// a plain copy is a kernel. Returns an error if the runtime or the driver does not support this; it
// is then safe to issue all copies again.
[[nodiscard]] cudaError_t copy_beside_computation(const std::vector<Copy>& copies,
                                                  cudaStream_t stream);

}  // namespace dualpipe
