#include "device/fake_device.h"

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <utility>

namespace dualpipe::testing {
namespace {

class FakeEvent final : public Event, public std::enable_shared_from_this<FakeEvent> {
 public:
  [[nodiscard]] bool done() const override {
    const std::lock_guard lock(mutex_);
    return done_;
  }
  void synchronize() const override {
    std::unique_lock lock(mutex_);
    cv_.wait(lock, [this] { return done_; });
  }
  void hold_back(Stream& stream) const override {
    dynamic_cast<FakeStream&>(stream).launch(
        [event = shared_from_this()] { event->synchronize(); });
  }
  void set() {
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
    }
    cv_.notify_all();
  }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable cv_;
  bool done_ = false;
};

// Uses the clock of the thread that acts as the stream.
class FakeStopwatch final : public Stopwatch {
 public:
  explicit FakeStopwatch(FakeStream& stream) : stream_(stream) {}
  void mark() override {
    auto time = std::make_shared<Clock::time_point>();
    times_.push_back(time);
    stream_.launch([time] { *time = Clock::now(); });
  }
  std::vector<std::int64_t> read() override {
    stream_.record()->synchronize();
    std::vector<std::int64_t> since;
    for (const auto& time : times_) {
      since.push_back(std::chrono::nanoseconds(*time - *times_.front()).count());
    }
    return since;
  }

 private:
  using Clock = std::chrono::steady_clock;
  FakeStream& stream_;
  std::vector<std::shared_ptr<Clock::time_point>> times_;
};

class PoisonedAllocator final : public Allocator {
 public:
  explicit PoisonedAllocator(std::shared_ptr<std::atomic<int>> count) : count_(std::move(count)) {}
  void* allocate(std::size_t num_bytes) override {
    void* data = host_allocator()->allocate(num_bytes);
    std::memset(data, 0xEE, num_bytes);
    ++*count_;
    return data;
  }
  void free(void* data) noexcept override { host_allocator()->free(data); }

 private:
  const std::shared_ptr<std::atomic<int>> count_;
};

}  // namespace

FakeQueue fake_queue() { return std::make_shared<HostStream>("fake_stream"); }

FakeStream::FakeStream(FakeQueue queue) : queue_(std::move(queue)) {}

FakeStream::~FakeStream() { queue_->synchronize(); }

EventPtr FakeStream::record() {
  auto event = std::make_shared<FakeEvent>();
  launch([event] { event->set(); });
  return event;
}

StopwatchMaker fake_stopwatches(FakeDevice& device) {
  return [&device] { return std::make_unique<FakeStopwatch>(device.compute()); };
}

FakeDevice::FakeDevice(FakeQueue message_queue)
    : message_queue_(std::move(message_queue)),
      allocator_(std::make_shared<PoisonedAllocator>(num_allocations_)) {}

}  // namespace dualpipe::testing
