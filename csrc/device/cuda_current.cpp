#include "device/cuda_current.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/error.h"

namespace dualpipe {
namespace {

constexpr unsigned kDriverVersion = 12'000;  // of the interface, not a minimum for the driver

void* look_up(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult state = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t result =
      cudaGetDriverEntryPointByVersion(name, &found, kDriverVersion, cudaEnableDefault, &state);
  if (result != cudaSuccess) (void)cudaGetLastError();
  return state == cudaDriverEntryPointSuccess ? found : nullptr;
}

bool has_context(int device) {
  static const auto get_state = reinterpret_cast<decltype(&cuDevicePrimaryCtxGetState)>(
      look_up("cuDevicePrimaryCtxGetState"));
  unsigned flags = 0;
  int is_active = 0;
  return get_state != nullptr && get_state(device, &flags, &is_active) == CUDA_SUCCESS &&
         is_active != 0;
}

}  // namespace

OnDevice::OnDevice(int device) {
  (void)cudaGetDevice(&before_);
  (void)cudaSetDevice(device);
}

OnDevice::~OnDevice() {
  int now = before_;
  (void)cudaGetDevice(&now);
  if (now != before_ && has_context(before_)) (void)cudaSetDevice(before_);
}

void* find_driver_call(const char* name) {
  void* const found = look_up(name);
  DUALPIPE_USER_CHECK(found != nullptr, "the CUDA driver of this machine has no ", name,
                      ", which transport=\"copy\" needs: choose transport=\"nccl\"");
  return found;
}

}  // namespace dualpipe
