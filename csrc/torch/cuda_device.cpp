#include "torch/cuda_device.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <mutex>
#include <vector>

namespace dualpipe {
namespace {

// Events are made once and used again: making one takes longer than recording it.
class EventPool {
 public:
  explicit EventPool(int device) : device_(device) {}
  ~EventPool() {
    for (cudaEvent_t event : free_) (void)cudaEventDestroy(event);
  }
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  cudaEvent_t take() {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        cudaEvent_t event = free_.back();
        free_.pop_back();
        return event;
      }
    }
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device_));
    cudaEvent_t event = nullptr;
    C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
  }
  void give_back(cudaEvent_t event) {
    const std::lock_guard lock(mutex_);
    free_.push_back(event);
  }

 private:
  const int device_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> free_;
};

class CudaEvent final : public Event {
 public:
  CudaEvent(std::shared_ptr<EventPool> pool, int device, cudaStream_t stream)
      : pool_(std::move(pool)), device_(device), event_(pool_->take()) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    C10_CUDA_CHECK(cudaEventRecord(event_, stream));
  }
  ~CudaEvent() override { pool_->give_back(event_); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  [[nodiscard]] bool done() const override {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device_));
    const cudaError_t state = cudaEventQuery(event_);
    if (state == cudaErrorNotReady) {
      (void)cudaGetLastError();  // an answer, not an error
      return false;
    }
    C10_CUDA_CHECK(state);
    return true;
  }
  void synchronize() const override {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device_));
    C10_CUDA_CHECK(cudaEventSynchronize(event_));
  }
  void hold_back(int device, cudaStream_t stream) const {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    C10_CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0));
  }

 private:
  const std::shared_ptr<EventPool> pool_;
  const int device_;
  const cudaEvent_t event_;
};

// What a stream of another kind would give cannot get here: all events of an engine are its
// device's.
void make_wait(int device, cudaStream_t stream, const EventPtr& event) {
  if (event) static_cast<const CudaEvent&>(*event).hold_back(device, stream);
}

class CudaStream final : public Stream {
 public:
  CudaStream(std::shared_ptr<EventPool> pool, int device)
      : pool_(std::move(pool)), device_(device) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device_));
    int lowest = 0;
    int highest = 0;
    C10_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
    C10_CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest));
  }
  ~CudaStream() override { (void)cudaStreamDestroy(stream_); }
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  EventPtr record() override { return std::make_shared<CudaEvent>(pool_, device_, stream_); }
  void wait(const EventPtr& event) override { make_wait(device_, stream_, event); }
  [[nodiscard]] void* handle() const override { return stream_; }

 private:
  const std::shared_ptr<EventPool> pool_;
  const int device_;
  cudaStream_t stream_ = nullptr;
};

class CudaAllocator final : public Allocator {
 public:
  explicit CudaAllocator(int device) : device_(device) {}
  void* allocate(std::size_t num_bytes) override {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device_));
    return c10::cuda::CUDACachingAllocator::raw_alloc(num_bytes);
  }
  void free(void* data) noexcept override { c10::cuda::CUDACachingAllocator::raw_delete(data); }

 private:
  const int device_;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index)
      : index_(index),
        events_(std::make_shared<EventPool>(index)),
        allocator_(std::make_shared<CudaAllocator>(index)) {}

  void begin() override {
    compute_ = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(index_)).stream();
  }
  EventPtr record() override {
    return std::make_shared<CudaEvent>(events_, index_, compute_.load());
  }
  void wait(const EventPtr& event) override { make_wait(index_, compute_, event); }
  std::unique_ptr<Stream> new_stream() override {
    return std::make_unique<CudaStream>(events_, index_);
  }
  std::shared_ptr<Allocator> allocator() override { return allocator_; }

 private:
  const int index_;
  const std::shared_ptr<EventPool> events_;
  const std::shared_ptr<Allocator> allocator_;
  std::atomic<cudaStream_t> compute_ = nullptr;
};

}  // namespace

std::shared_ptr<Device> cuda_device(int index) { return std::make_shared<CudaDevice>(index); }

}  // namespace dualpipe
