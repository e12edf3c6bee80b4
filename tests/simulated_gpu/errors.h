#pragma once

#include <cuda_runtime_api.h>

namespace simulated {

// Returns it, and keeps it for cudaGetLastError() of this thread.
cudaError_t fail(cudaError_t error);

// Says on stderr what the simulated GPU lacks, once each.
void lacks(const char* what, const char* name);

}  // namespace simulated
