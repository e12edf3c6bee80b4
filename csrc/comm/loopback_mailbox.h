#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>

#include "comm/failure_flag.h"
#include "comm/loopback.h"
#include "comm/transport.h"

namespace dualpipe::loopback {

using Clock = std::chrono::steady_clock;

// The messages in transit on one channel. They are numbered from 0 within an epoch (the time
// between two recoveries); a message of an older epoch is dropped, one of a newer epoch stays
// invisible to a receiver that has not recovered yet.
class Mailbox {
 public:
  // Thread-safe. `link` determines when the message can be taken.
  void put(std::uint64_t epoch, const MessageId& id, Message message, std::size_t num_bytes,
           const LinkOptions& link);

  struct Delivery {
    MessageId id;
    Message message;
  };
  // Blocks until the message is delivered, or throws the failure in `failure`.
  [[nodiscard]] Delivery take(std::uint64_t epoch, std::uint64_t number,
                              const FailureFlag& failure);

  void wake();  // makes a blocked take() check its failure flag

 private:
  struct Envelope {
    Delivery delivery;
    Clock::time_point delivered_at;  // the clock's epoch: delivered at once
  };

  void renew(std::uint64_t epoch);
  [[nodiscard]] std::optional<Envelope>* find(std::uint64_t epoch, std::uint64_t number);
  [[nodiscard]] Delivery remove(std::uint64_t number);

  std::mutex mutex_;
  std::condition_variable cv_;
  std::uint64_t epoch_ = 0;
  std::uint64_t first_ = 0;  // number of the first envelope
  std::deque<std::optional<Envelope>> envelopes_;
  Clock::time_point busy_until_;  // when the link will have taken all bytes so far
};

}  // namespace dualpipe::loopback
