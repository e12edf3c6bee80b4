#include "torch/cuda_device.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace dualpipe {
namespace {

// Events are reused: creating one takes longer than recording it.
class EventPool {
 public:
  EventPool(int device, unsigned flags) : device_(device), flags_(flags) {}
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
    C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, flags_));
    return event;
  }
  void give_back(cudaEvent_t event) {
    const std::lock_guard lock(mutex_);
    free_.push_back(event);
  }

 private:
  const int device_;
  const unsigned flags_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> free_;
};

// A pooled event; returns to its pool when destroyed.
class LentEvent {
 public:
  explicit LentEvent(std::shared_ptr<EventPool> pool)
      : pool_(std::move(pool)), event_(pool_->take()) {}
  ~LentEvent() { pool_->give_back(event_); }
  LentEvent(const LentEvent&) = delete;
  LentEvent& operator=(const LentEvent&) = delete;
  [[nodiscard]] cudaEvent_t get() const { return event_; }

 private:
  const std::shared_ptr<EventPool> pool_;
  const cudaEvent_t event_;
};

class CudaEvent final : public Event {
 public:
  CudaEvent(std::shared_ptr<EventPool> pool, int device, cudaStream_t stream)
      : device_(device), event_(std::move(pool)) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    C10_CUDA_CHECK(cudaEventRecord(event_.get(), stream));
  }

  [[nodiscard]] bool done() const override {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device_));
    const cudaError_t state = cudaEventQuery(event_.get());
    if (state == cudaErrorNotReady) {
      (void)cudaGetLastError();  // an answer, not an error
      return false;
    }
    C10_CUDA_CHECK(state);
    return true;
  }
  void synchronize() const override {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device_));
    c10::cuda::warn_or_error_on_sync();  // what torch.cuda.set_sync_debug_mode() asks for
    C10_CUDA_CHECK(cudaEventSynchronize(event_.get()));
  }
  void hold_back(Stream& stream) const override {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device_));
    C10_CUDA_CHECK(
        cudaStreamWaitEvent(static_cast<cudaStream_t>(stream.handle()), event_.get(), 0));
  }

 private:
  const int device_;
  const LentEvent event_;
};

enum class Priority { kLowest, kHighest };

cudaStream_t make_stream(int device, Priority priority) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  int lowest = 0;
  int highest = 0;
  cudaStream_t stream = nullptr;
  C10_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
  C10_CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking,
                                              priority == Priority::kHighest ? highest : lowest));
  return stream;
}

// A stream that the device owns; `release` disposes of it.
class OwnStream final : public Stream {
 public:
  using Release = std::function<void(cudaStream_t)>;
  OwnStream(std::shared_ptr<EventPool> pool, int device, cudaStream_t stream, Release release)
      : pool_(std::move(pool)), device_(device), stream_(stream), release_(std::move(release)) {}
  ~OwnStream() override { release_(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  EventPtr record() override { return std::make_shared<CudaEvent>(pool_, device_, stream_); }
  [[nodiscard]] void* handle() const override { return stream_; }

 private:
  const std::shared_ptr<EventPool> pool_;
  const int device_;
  const cudaStream_t stream_;
  const Release release_;
};

// Streams that last as long as the process: torch's allocator remembers the stream that memory was
// allocated on, and may synchronize with it whenever it frees that memory.
class LastingStreams {
 public:
  static LastingStreams& all() {
    static auto* const streams = new LastingStreams;
    return *streams;
  }
  cudaStream_t take(int device) {
    {
      const std::lock_guard lock(mutex_);
      std::vector<cudaStream_t>& free = free_[device];
      if (!free.empty()) {
        cudaStream_t stream = free.back();
        free.pop_back();
        return stream;
      }
      free.reserve(++num_made_[device]);  // that giving one back allocates nothing
    }
    return make_stream(device, Priority::kLowest);
  }
  void give_back(int device, cudaStream_t stream) {
    const std::lock_guard lock(mutex_);
    free_[device].push_back(stream);
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<cudaStream_t>> free_;
  std::map<int, std::size_t> num_made_;
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

// The stream that the thread of the step computes on: torch's current one.
class ComputeStream final : public Stream {
 public:
  ComputeStream(std::shared_ptr<EventPool> pool, int device)
      : pool_(std::move(pool)), device_(device) {}

  void begin() {
    stream_ = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device_)).stream();
  }
  EventPtr record() override { return std::make_shared<CudaEvent>(pool_, device_, stream_.load()); }
  [[nodiscard]] void* handle() const override { return stream_.load(); }

 private:
  const std::shared_ptr<EventPool> pool_;
  const int device_;
  std::atomic<cudaStream_t> stream_ = nullptr;
};

class CudaStopwatch final : public Stopwatch {
 public:
  CudaStopwatch(std::shared_ptr<EventPool> timed_events, int device, cudaStream_t stream)
      : pool_(std::move(timed_events)), device_(device), stream_(stream) {}

  void mark() override {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device_));
    auto event = std::make_unique<LentEvent>(pool_);
    C10_CUDA_CHECK(cudaEventRecord(event->get(), stream_));
    marks_.push_back(std::move(event));
  }
  std::vector<std::int64_t> read() override {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device_));
    c10::cuda::warn_or_error_on_sync();
    C10_CUDA_CHECK(cudaEventSynchronize(marks_.back()->get()));
    std::vector<std::int64_t> since;
    since.reserve(marks_.size());
    for (const auto& mark : marks_) {
      float milliseconds = 0;
      C10_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, marks_.front()->get(), mark->get()));
      since.push_back(static_cast<std::int64_t>(1e6 * static_cast<double>(milliseconds)));
    }
    return since;
  }

 private:
  const std::shared_ptr<EventPool> pool_;
  const int device_;
  const cudaStream_t stream_;
  std::vector<std::unique_ptr<LentEvent>> marks_;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int index, bool reductions_may_wait)
      : index_(index),
        reductions_may_wait_(reductions_may_wait),
        events_(std::make_shared<EventPool>(index, cudaEventDisableTiming)),
        allocator_(std::make_shared<CudaAllocator>(index)),
        compute_(events_, index),
        reductions_(make_reductions()) {}

  void begin() override { compute_.begin(); }
  Stream& compute() override { return compute_; }
  Stream& reduction(std::size_t number) override {
    return reductions_may_wait_ ? *reductions_.at(number) : *reductions_.front();
  }
  void reduce(std::size_t number, const std::function<void()>& work) override {
    const c10::cuda::CUDAStreamGuard guard(
        c10::cuda::getStreamFromExternal(static_cast<cudaStream_t>(reduction(number).handle()),
                                         static_cast<c10::DeviceIndex>(index_)));
    work();
  }
  [[nodiscard]] bool reductions_may_wait() const override { return reductions_may_wait_; }
  std::unique_ptr<Stream> new_stream() override {
    return std::make_unique<OwnStream>(
        events_, index_, make_stream(index_, Priority::kHighest),
        [](cudaStream_t stream) { (void)cudaStreamDestroy(stream); });
  }
  std::shared_ptr<Allocator> allocator() override { return allocator_; }

 private:
  // One for all if they may not wait, so that as few streams as possible share a queue with
  // computation.
  [[nodiscard]] std::vector<std::unique_ptr<Stream>> make_reductions() const {
    std::vector<std::unique_ptr<Stream>> made(reductions_may_wait_ ? kNumReductions : 1);
    for (auto& stream : made) {
      stream = std::make_unique<OwnStream>(
          events_, index_, LastingStreams::all().take(index_),
          [index = index_](cudaStream_t past) { LastingStreams::all().give_back(index, past); });
    }
    return made;
  }

  const int index_;
  const bool reductions_may_wait_;
  const std::shared_ptr<EventPool> events_;
  const std::shared_ptr<Allocator> allocator_;
  ComputeStream compute_;
  std::vector<std::unique_ptr<Stream>> reductions_;
};

}  // namespace

StopwatchMaker cuda_stopwatches(int index) {
  return [index, events = std::make_shared<EventPool>(index, cudaEventDefault)] {
    const auto stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(index));
    return std::make_unique<CudaStopwatch>(events, index, stream.stream());
  };
}

std::shared_ptr<Device> cuda_device(int index, bool reductions_may_wait) {
  return std::make_shared<CudaDevice>(index, reductions_may_wait);
}

}  // namespace dualpipe
