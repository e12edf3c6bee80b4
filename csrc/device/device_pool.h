#pragma once

#include <cstddef>
#include <memory>

#include "device/device.h"

namespace dualpipe {

// Buffers that message streams fill and one stream reads. Whoever lets go of one may have left
// reads of it in the reader's queue: the next user waits for those, on its own stream, and nobody
// else. No allocation once every size was seen as often as it is live at once. Thread-safe; buffers
// may outlive the pool.
class DevicePool {
 public:
  // The allocator may give what work that is still in the reader's queue uses. The device must
  // outlive all buffers and is kept alive; `reader` is one of its streams.
  DevicePool(std::shared_ptr<Device> device, Stream& reader, std::shared_ptr<Allocator> allocator);

  struct Lease {
    std::byte* data;
    EventPtr free;                // before this the bytes are still read
    std::shared_ptr<void> owner;  // gives the buffer back when the last copy goes
  };
  [[nodiscard]] Lease acquire(std::size_t num_bytes);

  [[nodiscard]] BufferPool::Statistics statistics() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace dualpipe
