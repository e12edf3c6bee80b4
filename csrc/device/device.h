#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "memory/buffer_pool.h"

namespace dualpipe {

class Stream;

// A point in the work of a stream. Immutable once recorded; any thread may ask.
class Event {
 public:
  virtual ~Event() = default;
  [[nodiscard]] virtual bool done() const = 0;
  virtual void synchronize() const = 0;  // blocks the host
  // What is issued on the stream from now on starts after this.
  virtual void hold_back(Stream& stream) const = 0;
};
using EventPtr = std::shared_ptr<Event>;  // null: what it stands for is done already

// A queue of work that a device does in order, beside that of other streams. Any thread.
class Stream {
 public:
  virtual ~Stream() = default;
  // All work issued so far.
  [[nodiscard]] virtual EventPtr record() = 0;
  // What libraries call the stream: a cudaStream_t.
  [[nodiscard]] virtual void* handle() const = 0;

  void wait(const EventPtr& event) {
    if (event) event->hold_back(*this);
  }
};

// When a stream gets to points in its work, by the device's own clock. One thread.
class Stopwatch {
 public:
  virtual ~Stopwatch() = default;
  // After all work issued so far.
  virtual void mark() = 0;
  // Nanoseconds from the first mark to each of them. Blocks until the stream is past the last one.
  [[nodiscard]] virtual std::vector<std::int64_t> read() = 0;
};
// Of the stream that the calling thread computes on. None on the host, where work is over when the
// call returns and the host's clock says how long it took.
using StopwatchMaker = std::function<std::unique_ptr<Stopwatch>()>;

// What one rank computes on, as far as the engine must know it. On the host work is over when the
// call returns, so that events are null and nothing waits; csrc/torch/cuda_* gives a real one. Any
// thread.
class Device {
 public:
  virtual ~Device() = default;
  // A step begins on this thread: what it computes on now is the compute stream.
  virtual void begin() = 0;
  [[nodiscard]] virtual Stream& compute() = 0;
  // Beside the compute stream: for sums of gradients. Several numbers may be one stream.
  static constexpr std::size_t kNumReductions = 2;
  [[nodiscard]] virtual Stream& reduction(std::size_t number) = 0;
  // Calls work(); what it computes, it computes on that reduction stream.
  virtual void reduce(std::size_t number, const std::function<void()>& work) = 0;
  // Whether a reduction stream may wait for another rank while computation is still to be issued:
  // in a shared hardware queue it would hold that back, of whichever rank.
  [[nodiscard]] virtual bool reductions_may_wait() const { return true; }
  // A stream for messages, ahead of computation where the device lets one be.
  [[nodiscard]] virtual std::unique_ptr<Stream> new_stream() = 0;
  // Memory that streams may use.
  [[nodiscard]] virtual std::shared_ptr<Allocator> allocator() = 0;
};

[[nodiscard]] std::shared_ptr<Device> host_device();

}  // namespace dualpipe
