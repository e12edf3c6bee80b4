#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <thread>

#include "errors.h"
#include "streams.h"

namespace {

constexpr std::chrono::microseconds kPoll{20};

std::atomic_ref<std::uint32_t> flag_at(CUdeviceptr address) {
  return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(address));
}

CUresult write_value(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned) {
  simulated::stream_of(stream).put([=] { flag_at(address) = value; });
  return CUDA_SUCCESS;
}

CUresult wait_value(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags) {
  if (flags != CU_STREAM_WAIT_VALUE_GEQ) return CUDA_ERROR_NOT_SUPPORTED;
  simulated::stream_of(stream).put([=] {
    while (static_cast<std::int32_t>(flag_at(address) - value) < 0) {
      std::this_thread::sleep_for(kPoll);
    }
  });
  return CUDA_SUCCESS;
}

CUresult not_supported() { return CUDA_ERROR_NOT_SUPPORTED; }

template <class Function>
void* any(Function* function) {
  return reinterpret_cast<void*>(function);
}

}  // namespace

// Torch looks it up by its name.
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* state) {
  static const std::map<std::string, void*> calls = {
      {"cuDevicePrimaryCtxGetState", any(cuDevicePrimaryCtxGetState)},
      {"cuStreamWriteValue32", any(write_value)},
      {"cuStreamWaitValue32", any(wait_value)},
  };
  const auto call = calls.find(name);
  *found = call != calls.end() ? call->second : any(not_supported);
  if (state != nullptr) *state = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
