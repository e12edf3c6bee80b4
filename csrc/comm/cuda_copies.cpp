#include "comm/cuda_copies.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <random>

#include "comm/cuda_copy_batch.h"
#include "common/error.h"
#include "device/cuda_current.h"

namespace dualpipe {
namespace {

void check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  (void)cudaGetLastError();
  throw PipelineError(cat("CUDA cannot ", what, ": ", cudaGetErrorString(result)));
}

void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  DUALPIPE_USER_CHECK(result != CUDA_ERROR_NOT_SUPPORTED, "this GPU cannot ", what,
                      ", which transport=\"copy\" needs: choose transport=\"nccl\"");
  throw PipelineError(
      cat("CUDA cannot ", what, ": error ", static_cast<int>(result), " of the driver"));
}

CUdeviceptr address_of(std::uint32_t* at) { return reinterpret_cast<CUdeviceptr>(at); }
cudaStream_t stream_of(const Stream& stream) { return static_cast<cudaStream_t>(stream.handle()); }

// Identifies a process on this node: process ids start over in every container, and a forked child
// inherits its parent's number.
struct ProcessId {
  std::uint64_t number;
  std::int64_t process;
  bool operator==(const ProcessId&) const = default;
};

ProcessId this_process() {
  static const std::uint64_t number = [] {
    std::random_device random;
    return std::uint64_t{random()} << 32 | random();
  }();
  return {number, getpid()};
}

using BusId = char[16];  // "0000:3b:00.0"

struct Handle {
  ProcessId owner;
  std::byte* address;  // in that process
  int device;          // its index in that process
  BusId bus_id;
  cudaError_t shared;  // whether other processes can open it
  cudaIpcMemHandle_t memory;
};
static_assert(sizeof(Handle) <= sizeof(BlockHandle));

Handle handle_in(const BlockHandle& block) {
  Handle handle;
  std::memcpy(&handle, block.data(), sizeof(handle));
  return handle;
}

class CudaCopies final : public CopyCalls {
 public:
  explicit CudaCopies(int device)
      : device_(device),
        write_value_(driver_call<decltype(cuStreamWriteValue32)>("cuStreamWriteValue32")),
        wait_value_(driver_call<decltype(cuStreamWaitValue32)>("cuStreamWaitValue32")) {
    int can_register = 0;
    check(cudaDeviceGetAttribute(&can_register, cudaDevAttrHostRegisterSupported, device_),
          "say what the GPU can do");
    DUALPIPE_USER_CHECK(can_register != 0, "GPU ", device_,
                        " cannot use flags in host memory, which transport=\"copy\" needs: choose "
                        "transport=\"nccl\"");
    check(cudaDeviceGetPCIBusId(bus_id_, sizeof(bus_id_), device_), "name the GPU");
  }

  std::byte* allocate(std::size_t num_bytes) override {
    const OnDevice here(device_);
    void* block = nullptr;
    check(cudaMalloc(&block, num_bytes),
          "allocate memory to receive into (it is not torch's, whose cache may hold all that is "
          "left: torch.cuda.empty_cache() gives that back)");
    return static_cast<std::byte*>(block);
  }
  void free(std::byte* block) noexcept override {
    const OnDevice here(device_);
    (void)cudaFree(block);
  }

  BlockHandle export_block(std::byte* block) override {
    const OnDevice here(device_);
    Handle handle{this_process(), block, device_, {}, cudaSuccess, {}};
    std::memcpy(handle.bus_id, bus_id_, sizeof(bus_id_));
    handle.shared = cudaIpcGetMemHandle(&handle.memory, block);  // threads do not need it
    (void)cudaGetLastError();
    BlockHandle exported{};
    std::memcpy(exported.data(), &handle, sizeof(handle));
    return exported;
  }

  std::byte* open_block(const BlockHandle& block) override {
    const OnDevice here(device_);
    const Handle handle = handle_in(block);
    require_reach(handle);
    if (handle.owner == this_process()) return handle.address;
    void* opened = nullptr;
    const cudaError_t result =
        handle.shared != cudaSuccess
            ? handle.shared
            : cudaIpcOpenMemHandle(&opened, handle.memory, cudaIpcMemLazyEnablePeerAccess);
    if (result != cudaSuccess) fail_to_reach(handle, cudaGetErrorString(result));
    return static_cast<std::byte*>(opened);
  }
  void close_block(const BlockHandle& block, std::byte* opened) noexcept override {
    if (handle_in(block).owner == this_process()) return;
    const OnDevice here(device_);
    (void)cudaIpcCloseMemHandle(opened);
  }

  std::byte* register_memory(std::byte* memory, std::size_t num_bytes) override {
    const OnDevice here(device_);
    check(cudaHostRegister(memory, num_bytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
          "use flags in host memory");
    void* there = nullptr;
    const cudaError_t found = cudaHostGetDevicePointer(&there, memory, 0);
    if (found != cudaSuccess) (void)cudaHostUnregister(memory);
    check(found, "find flags in host memory");
    return static_cast<std::byte*>(there);
  }
  void unregister_memory(std::byte* memory) noexcept override {
    const OnDevice here(device_);
    (void)cudaHostUnregister(memory);
  }

  void copy(const std::vector<Copy>& copies, Stream& stream) override {
    const OnDevice here(device_);
    const cudaStream_t native = stream_of(stream);
    if (takes_batches_) {
      if (copy_beside_computation(copies, native) == cudaSuccess) return;
      (void)cudaGetLastError();
      takes_batches_ = false;
    }
    for (const Copy& copy : copies) {
      check(cudaMemcpyAsync(copy.to, copy.from, copy.num_bytes, cudaMemcpyDefault, native), "copy");
    }
  }
  void write_value(std::uint32_t* at, std::uint32_t value, Stream& stream) override {
    const OnDevice here(device_);
    check(write_value_(stream_of(stream), address_of(at), value, CU_STREAM_WRITE_VALUE_DEFAULT),
          "write a flag from a stream");
  }
  void wait_value(std::uint32_t* at, std::uint32_t value, Stream& stream) override {
    const OnDevice here(device_);
    check(wait_value_(stream_of(stream), address_of(at), value, CU_STREAM_WAIT_VALUE_GEQ),
          "wait for a flag on a stream");
  }

 private:
  // A GPU that this process cannot see may still be reachable: opening its memory will tell.
  void require_reach(const Handle& handle) {
    int there = device_;
    if (cudaDeviceGetByPCIBusId(&there, handle.bus_id) != cudaSuccess) {
      (void)cudaGetLastError();
      return;
    }
    if (there == device_) return;
    int reaches = 0;
    check(cudaDeviceCanAccessPeer(&reaches, device_, there), "say which GPUs reach each other");
    if (reaches == 0) fail_to_reach(handle, "there is no direct path between the two");
    const cudaError_t result = cudaDeviceEnablePeerAccess(there, 0);
    if (result != cudaErrorPeerAccessAlreadyEnabled) check(result, "open the path to another GPU");
    (void)cudaGetLastError();
  }

  [[noreturn]] void fail_to_reach(const Handle& handle, const char* why) {
    (void)cudaGetLastError();
    throw UserError(cat("GPU ", bus_id_, " does not reach the memory of GPU ", handle.bus_id, ": ",
                        why, "; choose DualPipeConfig(transport=\"nccl\")"));
  }

  const int device_;
  BusId bus_id_ = {};
  decltype(cuStreamWriteValue32)* const write_value_;
  decltype(cuStreamWaitValue32)* const wait_value_;
  std::atomic<bool> takes_batches_ = true;
};

}  // namespace

std::shared_ptr<CopyCalls> cuda_copies(int device) { return std::make_shared<CudaCopies>(device); }

}  // namespace dualpipe
