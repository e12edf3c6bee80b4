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
  std::uint64_t is_last;  // of its message
};

// What the two ranks of one way share: a queue of postings that the hosts fill and empty, two flags
// that their streams write and wait for, and marks for the end. Flags count messages, round and
// round: `kReady` those whose memory may be written, `kArrived` those that are there. One side of
// it. Lasts until the streams that wait here are through. Thread-safe; postings by one thread at a
// time a side.
class CopyMailbox {
 public:
  enum Flag : std::uint8_t { kReady, kArrived };

  // Counting begins a little ahead of the wrap, so that every run goes through it.
  static constexpr std::uint32_t kFirstMessage = 0xFFFFFFF0;
  static constexpr std::uint32_t kCapacity = 256;

  // As side 0, who makes it.
  [[nodiscard]] static std::shared_ptr<CopyMailbox> create(std::shared_ptr<CopyCalls> calls);
  // As side 1, which has its name.
  [[nodiscard]] static std::shared_ptr<CopyMailbox> open(std::shared_ptr<CopyCalls> calls,
                                                         const std::string& name);
  CopyMailbox(std::shared_ptr<CopyCalls> calls, std::shared_ptr<SharedSegment> segment, int side);
  ~CopyMailbox();
  CopyMailbox(const CopyMailbox&) = delete;
  CopyMailbox& operator=(const CopyMailbox&) = delete;

  [[nodiscard]] const std::string& name() const { return segment_->name(); }

  [[nodiscard]] bool post(const Posting& posting);  // false: full
  [[nodiscard]] std::optional<Posting> take();

  // On the stream of the way.
  void write(Flag flag, std::uint32_t value, Stream& stream);
  void wait(Flag flag, std::uint32_t value, Stream& stream);
  // On any stream, for all that is issued on it from now on.
  void hold_back(Stream& stream, Flag flag, std::uint32_t value);
  [[nodiscard]] bool has_reached(Flag flag, std::uint32_t value) const;
  // Lets all pass who wait for one of the next 2^30 messages, until a stream writes again.
  void release_all(std::uint32_t message) noexcept;

  // Whether a message had come when the first of the two ranks ended; now, if none has.
  [[nodiscard]] bool has_arrived(std::uint32_t value) const;
  // A side has given up; it will never again touch memory of the other one; it is there.
  void mark_aborted() noexcept;
  void mark_quiet() noexcept;
  [[nodiscard]] bool is_over() const;  // one of them has given up
  [[nodiscard]] bool peer_aborted() const;
  [[nodiscard]] bool peer_quiet() const;
  [[nodiscard]] bool peer_came() const;   // some time
  [[nodiscard]] bool peer_lives() const;  // now

 private:
  struct Shared;

  [[nodiscard]] std::uint32_t* address(Flag flag) const;

  const std::shared_ptr<CopyCalls> calls_;
  const std::shared_ptr<SharedSegment> segment_;
  const int side_;
  Shared* const shared_;
  std::byte* device_view_ = nullptr;

  std::mutex mark_mutex_;  // of mark_aborted()
  std::mutex mutex_;
  std::vector<EventPtr> held_back_;  // of streams of others that may wait here still
};

}  // namespace dualpipe
