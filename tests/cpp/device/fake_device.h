#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>

#include "device/device.h"
#include "device/host_stream.h"

namespace dualpipe::testing {

// Does the work of one stream, or of several that share it as streams share a hardware queue: a
// wait then blocks everything behind it.
using FakeQueue = std::shared_ptr<HostStream>;
[[nodiscard]] FakeQueue fake_queue();

// A stream backed by a thread: work is really asynchronous, so a missing wait is a race that
// ThreadSanitizer sees.
class FakeStream final : public Stream {
 public:
  explicit FakeStream(FakeQueue queue = fake_queue());
  ~FakeStream() override;  // waits for all work: destroying a stream cancels nothing
  FakeStream(const FakeStream&) = delete;
  FakeStream& operator=(const FakeStream&) = delete;
  [[nodiscard]] EventPtr record() override;
  [[nodiscard]] void* handle() const override { return nullptr; }

  // Issues work, as a kernel launch does.
  void launch(std::function<void()> kernel) { queue_->enqueue(std::move(kernel)); }

 private:
  const FakeQueue queue_;
};

// A device whose memory is the host's, filled with 0xEE when it is allocated.
class FakeDevice final : public Device {
 public:
  // message_queue: shared by all message streams; null: each has its own.
  explicit FakeDevice(FakeQueue message_queue = nullptr);
  void begin() override {}
  [[nodiscard]] FakeStream& compute() override { return compute_; }
  [[nodiscard]] FakeStream& reduction(std::size_t number) override {
    return reductions_.at(number);
  }
  void reduce(std::size_t, const std::function<void()>& work) override { work(); }
  [[nodiscard]] std::unique_ptr<Stream> new_stream() override {
    return std::make_unique<FakeStream>(message_queue_ ? message_queue_ : fake_queue());
  }
  [[nodiscard]] std::shared_ptr<Allocator> allocator() override { return allocator_; }

  [[nodiscard]] int num_allocations() const { return *num_allocations_; }

 private:
  const FakeQueue message_queue_;
  std::shared_ptr<std::atomic<int>> num_allocations_ = std::make_shared<std::atomic<int>>(0);
  std::shared_ptr<Allocator> allocator_;
  FakeStream compute_;
  std::array<FakeStream, kNumReductions> reductions_;
};

// The clock of a device's compute stream.
[[nodiscard]] StopwatchMaker fake_stopwatches(FakeDevice& device);

}  // namespace dualpipe::testing
