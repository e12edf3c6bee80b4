#pragma once

#include <memory>

#include "memory/buffer_pool.h"

namespace dualpipe {

// A point in the work of a stream. Immutable once recorded; any thread may ask.
class Event {
 public:
  virtual ~Event() = default;
  [[nodiscard]] virtual bool done() const = 0;
  virtual void synchronize() const = 0;  // blocks the host
};
using EventPtr = std::shared_ptr<Event>;  // null: what it stands for is done already

// A queue of work that a device does in order, beside that of other streams. Any thread.
class Stream {
 public:
  virtual ~Stream() = default;
  // All work issued so far.
  [[nodiscard]] virtual EventPtr record() = 0;
  // Work issued from now on starts after the event.
  virtual void wait(const EventPtr& event) = 0;
  // What libraries call the stream: a cudaStream_t.
  [[nodiscard]] virtual void* handle() const = 0;
};

// What one rank computes on, as far as the engine must know it. On the host computation is over
// when the call returns, so events are null, nothing waits and there are no streams;
// csrc/device/cuda_* gives real ones. Any thread.
class Device {
 public:
  virtual ~Device() = default;
  // A step begins on this thread: what it computes on now is the compute stream.
  virtual void begin() = 0;
  // The compute stream, as Stream.
  [[nodiscard]] virtual EventPtr record() = 0;
  virtual void wait(const EventPtr& event) = 0;
  // A stream for messages, ahead of computation where the device lets one be.
  [[nodiscard]] virtual std::unique_ptr<Stream> new_stream() = 0;
  // Memory that streams may use.
  [[nodiscard]] virtual std::shared_ptr<Allocator> allocator() = 0;
};

[[nodiscard]] std::shared_ptr<Device> host_device();

}  // namespace dualpipe
