#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "memory/buffer_pool.h"

namespace dualpipe {

class Stream;

// A point in a stream's work. Immutable once recorded; usable from any thread.
class Event {
 public:
  virtual ~Event() = default;
  [[nodiscard]] virtual bool done() const = 0;
  virtual void synchronize() const = 0;  // blocks the host
  // Work issued on the stream from now on starts after this event.
  virtual void hold_back(Stream& stream) const = 0;
};
using EventPtr = std::shared_ptr<Event>;  // null: already done

// Waits for an event, but not for ever; returns whether it is done. Unlike synchronize(), also
// where torch.cuda.set_sync_debug_mode() makes waits errors.
[[nodiscard]] bool done_within(const Event& event, std::chrono::milliseconds limit);

// A queue of work that a device executes in order, concurrently with other streams. Usable from any
// thread.
class Stream {
 public:
  virtual ~Stream() = default;
  // The end of all work issued so far.
  [[nodiscard]] virtual EventPtr record() = 0;
  // The native handle that libraries take: a cudaStream_t.
  [[nodiscard]] virtual void* handle() const = 0;

  void wait(const EventPtr& event) {
    if (event) event->hold_back(*this);
  }
};

// Records when a stream reaches points in its work, by the device's own clock. For one thread.
class Stopwatch {
 public:
  virtual ~Stopwatch() = default;
  // Marks the end of all work issued so far.
  virtual void mark() = 0;
  // Nanoseconds from the first mark to each mark. Blocks until the stream has passed the last one.
  [[nodiscard]] virtual std::vector<std::int64_t> read() = 0;
};
// Makes one for the stream that the calling thread computes on. Empty on the host, where work is
// done when the call returns and the host's clock shows how long it took.
using StopwatchMaker = std::function<std::unique_ptr<Stopwatch>()>;

// What one rank computes on, as far as the engine needs to know. On the host, work is done when the
// call returns, so events are null and nothing waits; csrc/torch/cuda_* has a real device. Usable
// from any thread.
class Device {
 public:
  virtual ~Device() = default;
  // A step begins on this thread: the stream it now computes on becomes the compute stream.
  virtual void begin() = 0;
  [[nodiscard]] virtual Stream& compute() = 0;
  // Streams beside the compute stream, for summing gradients. Different numbers may share a stream.
  static constexpr std::size_t kNumReductions = 2;
  [[nodiscard]] virtual Stream& reduction(std::size_t number) = 0;
  // Calls work() with that reduction stream as the one to compute on.
  virtual void reduce(std::size_t number, const std::function<void()>& work) = 0;
  // Whether a reduction stream may wait for another rank before all computation has been issued: in
  // a shared hardware queue the wait would block the computation behind it, whichever rank's it is.
  [[nodiscard]] virtual bool reductions_may_wait() const { return true; }
  // A stream for messages, with priority over computation if the device supports that.
  [[nodiscard]] virtual std::unique_ptr<Stream> new_stream() = 0;
  // Allocates memory that streams may use.
  [[nodiscard]] virtual std::shared_ptr<Allocator> allocator() = 0;
};

[[nodiscard]] std::shared_ptr<Device> host_device();

}  // namespace dualpipe
