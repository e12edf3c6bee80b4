// Kernels. torch's own, compiled for a GPU, cannot run: python/ has others for its operations.
// Of torch's only the one that waits for a while is known, by its name.
#include <cuda_runtime_api.h>

#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "errors.h"
#include "streams.h"

namespace {

constexpr double kClockHz = 0.9e9;  // slow, as are the operations here

struct Configuration {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

struct Names {
  std::mutex mutex;
  std::map<const void*, std::string> of_kernels;
};

Names& names() {
  static auto* const all = new Names;
  return *all;
}

std::string name_of(const void* kernel) {
  const std::lock_guard lock(names().mutex);
  const auto found = names().of_kernels.find(kernel);
  return found != names().of_kernels.end() ? found->second : "without a name";
}

cudaError_t launch(const void* kernel, void** arguments, cudaStream_t stream) {
  const std::string name = name_of(kernel);
  if (name.find("spin_kernel") == std::string::npos) {
    simulated::lacks("kernel", name.c_str());
    return simulated::fail(cudaErrorNotSupported);
  }
  const auto cycles = static_cast<double>(*static_cast<std::int64_t*>(arguments[0]));
  const std::chrono::duration<double> time(cycles / kClockHz);
  simulated::stream_of(stream).put([time] { std::this_thread::sleep_for(time); });
  return cudaSuccess;
}

}  // namespace

extern "C" {

void simulated_gpu_launch(cudaStream_t stream, void (*kernel)(long), long number) {
  simulated::stream_of(stream).put([=] { kernel(number); });
}

void** __cudaRegisterFatBinary(void*) {
  static void* none = nullptr;
  return &none;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  const std::lock_guard lock(names().mutex);
  names().of_kernels[kernel] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared_bytes,
                                     cudaStream_t stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared_bytes,
                                       void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void** arguments, std::size_t,
                               cudaStream_t stream) {
  return launch(kernel, arguments, stream);
}
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void** arguments, std::size_t,
                             cudaStream_t stream) {
  return launch(kernel, arguments, stream);
}
