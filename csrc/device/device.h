#pragma once

#include <memory>

namespace dualpipe {

// A point in the work of a stream. Immutable once recorded; any thread may ask.
class Event {
 public:
  virtual ~Event() = default;
  [[nodiscard]] virtual bool done() const = 0;
  virtual void synchronize() const = 0;  // blocks the host
};

// The compute stream of one rank, as far as the engine must know it. On the host computation is
// over when the call returns, so events are null and nothing waits; csrc/device/cuda_* gives real
// ones. One thread at a time.
class Device {
 public:
  virtual ~Device() = default;
  // All work issued to the compute stream so far. Null: already done.
  [[nodiscard]] virtual std::shared_ptr<Event> record() = 0;
  // Work issued from now on starts after the event. Null: no wait.
  virtual void wait(const std::shared_ptr<Event>& event) = 0;
};

[[nodiscard]] std::unique_ptr<Device> host_device();

}  // namespace dualpipe
