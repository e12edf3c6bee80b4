#pragma once

#include <list>
#include <memory>
#include <mutex>

#include "comm/byte_link.h"
#include "comm/failure_flag.h"
#include "memory/buffer_pool.h"

namespace dualpipe {

// The unfinished operations of one transport, and the memory they use. Owns both until the
// operation is done, or to the end of the process if it was aborted: the other side may still
// write, and a link whose memory is gone gets stuck (gloo). Thread-safe.
class Operations {
 public:
  struct Entry {
    std::unique_ptr<ByteOperation> operation;
    std::shared_ptr<Buffer> buffer;
  };
  using Handle = std::list<Entry>::iterator;

  explicit Operations(const FailureFlag& failure) : failure_(failure) {}
  ~Operations();
  Operations(const Operations&) = delete;
  Operations& operator=(const Operations&) = delete;

  // The operation is aborted at once if the transport has failed already.
  [[nodiscard]] Handle add(Entry entry);

  // Forgets an operation that is done, and returns its memory.
  std::shared_ptr<Buffer> finish(Handle handle);

  void abort_all() noexcept;

  // Sets all operations aside. They must not be waited for any more.
  void bury();

 private:
  const FailureFlag& failure_;
  std::mutex mutex_;
  std::list<Entry> entries_;
  std::list<Entry> buried_;
};

}  // namespace dualpipe
