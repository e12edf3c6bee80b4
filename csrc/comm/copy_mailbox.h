#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "comm/copy_calls.h"
#include "comm/shared_segment.h"

namespace dualpipe {

// Where a receiver wants one piece of a message.
struct Posting {
  BlockHandle block;
  std::uint64_t offset;
  std::uint64_t num_bytes;
  std::uint64_t is_last;  // the last piece of its message
};

// One side of what the two ranks of a way share: a queue of postings that the hosts fill and empty,
// two flags that their streams write and wait for, and marks for the end. Flags are message
// counters that wrap around: `kReady` counts messages whose memory may be written, `kArrived` those
// that have arrived. The destructor waits for the streams that wait here. Thread-safe; postings are
// made or taken by one thread at a time on each side.
class CopyMailbox {
 public:
  enum Flag : std::uint8_t { kReady, kArrived };

  // Counting begins shortly before the wrap, so that every run goes through it.
  static constexpr std::uint32_t kFirstMessage = 0xFFFFFFF0;
  static constexpr std::uint32_t kCapacity = 256;

  // As side 0, which creates it.
  [[nodiscard]] static std::shared_ptr<CopyMailbox> create(std::shared_ptr<CopyCalls> calls);
  // As side 1, which knows its name.
  [[nodiscard]] static std::shared_ptr<CopyMailbox> open(std::shared_ptr<CopyCalls> calls,
                                                         const std::string& name);
  CopyMailbox(std::shared_ptr<CopyCalls> calls, std::shared_ptr<SharedSegment> segment, int side);
  ~CopyMailbox();
  CopyMailbox(const CopyMailbox&) = delete;
  CopyMailbox& operator=(const CopyMailbox&) = delete;

  [[nodiscard]] const std::string& name() const { return segment_->name(); }

  [[nodiscard]] bool post(const Posting& posting);  // false: full
  [[nodiscard]] std::optional<Posting> take();

  // On the way's own stream.
  void write(Flag flag, std::uint32_t value, Stream& stream);
  void wait(Flag flag, std::uint32_t value, Stream& stream);
  // On any stream: holds back all work issued on it from now on.
  void hold_back(Stream& stream, Flag flag, std::uint32_t value);
  [[nodiscard]] bool has_reached(Flag flag, std::uint32_t value) const;
  // Ends all waits for messages up to 2^30 after `message`, until a stream writes a flag again.
  void release_all(std::uint32_t message) noexcept;

  // Whether a message had arrived when the first of the two sides gave up; if neither has, whether
  // it has arrived now.
  [[nodiscard]] bool has_arrived(std::uint32_t value) const;
  // Marks of a side. aborted: it has given up. quiet: it will never again touch the other side's
  // memory. came: it has joined.
  void mark_aborted() noexcept;
  void mark_quiet() noexcept;
  [[nodiscard]] bool is_over() const;  // either side has given up
  [[nodiscard]] bool peer_aborted() const;
  [[nodiscard]] bool peer_quiet() const;
  [[nodiscard]] bool peer_came() const;   // at any time so far
  [[nodiscard]] bool peer_lives() const;  // its process is alive now

 private:
  struct Shared;

  [[nodiscard]] std::uint32_t* address(Flag flag) const;

  const std::shared_ptr<CopyCalls> calls_;
  const std::shared_ptr<SharedSegment> segment_;
  const int side_;
  Shared* const shared_;
  std::byte* device_view_ = nullptr;

  std::mutex mark_mutex_;  // for mark_aborted()
  std::mutex mutex_;
  std::vector<EventPtr> held_back_;  // of other streams that may still wait here
};

}  // namespace dualpipe
