#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "comm/copy_calls.h"

namespace dualpipe {

// One call for several copies, with the hint that they take a copy engine even within one GPU,
// where a plain copy is a kernel. Any error where the runtime or the driver does not have it;
// nothing has been copied then, or what was may be copied again.
[[nodiscard]] cudaError_t copy_beside_computation(const std::vector<Copy>& copies,
                                                  cudaStream_t stream);

}  // namespace dualpipe
