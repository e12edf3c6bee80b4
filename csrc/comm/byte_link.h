#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "common/ids.h"

namespace dualpipe {

// One untyped message in transit, in or out.
class ByteOperation {
 public:
  virtual ~ByteOperation() = default;
  // Blocks until the bytes have left or arrived; false: aborted. Throws PipelineError when the link
  // is broken. Call it once, from one thread.
  [[nodiscard]] virtual bool wait() = 0;
  // Makes wait() return false, even if it is called later. Any thread.
  virtual void abort() noexcept = 0;
};

// What FramedTransport builds on: byte messages between ranks, matched by (peer, tag) and in order
// within each such pair. A message may be shorter than the memory posted for it, never longer (gloo
// ends the process). The memory must stay valid until the operation is done, even if it was
// aborted: the other side may still be about to write. Both calls return at once and throw
// PipelineError when the link is broken. Thread-safe.
class ByteLink {
 public:
  virtual ~ByteLink() = default;
  [[nodiscard]] virtual std::unique_ptr<ByteOperation> send(Rank to, std::uint32_t tag,
                                                            std::byte* data,
                                                            std::size_t num_bytes) = 0;
  [[nodiscard]] virtual std::unique_ptr<ByteOperation> receive(Rank from, std::uint32_t tag,
                                                               std::byte* data,
                                                               std::size_t capacity) = 0;
};

}  // namespace dualpipe
