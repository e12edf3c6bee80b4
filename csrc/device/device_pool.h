#pragma once

#include <cstddef>
#include <memory>

#include "device/device.h"

namespace dualpipe {

// Buffers that message streams fill and one stream, the reader, reads. When a buffer is released,
// reads of it may still be queued on the reader: only its next user waits for them, on its own
// stream. Once the pool has as many buffers of each size as are ever live at the same time, it
// allocates no more. Thread-safe; buffers may outlive the pool.
class DevicePool {
 public:
  // The allocator may return memory that work queued on the reader still uses. The device must
  // outlive all buffers and is kept alive; `reader` is one of its streams.
  DevicePool(std::shared_ptr<Device> device, Stream& reader, std::shared_ptr<Allocator> allocator);

  struct Lease {
    std::byte* data;
    EventPtr free;                // until this, the bytes may still be read
    std::shared_ptr<void> owner;  // returns the buffer when its last copy is destroyed
  };
  [[nodiscard]] Lease acquire(std::size_t num_bytes);

  [[nodiscard]] BufferPool::Statistics statistics() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace dualpipe
