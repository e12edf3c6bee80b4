#include "comm/loopback_mailbox.h"

#include <sys/prctl.h>

#include <algorithm>
#include <utility>

namespace dualpipe::loopback {
namespace {

// Linux may end a timed wait up to 50 microseconds late, to batch timers. A thread that holds
// one of these is exempt.
class PreciseTimers {
 public:
  PreciseTimers() : before_ns_(prctl(PR_GET_TIMERSLACK)) { prctl(PR_SET_TIMERSLACK, 1UL); }
  ~PreciseTimers() {
    if (before_ns_ > 0) prctl(PR_SET_TIMERSLACK, static_cast<unsigned long>(before_ns_));
  }
  PreciseTimers(const PreciseTimers&) = delete;
  PreciseTimers& operator=(const PreciseTimers&) = delete;

 private:
  int before_ns_;
};

Clock::duration transfer_time(std::size_t num_bytes, const LinkOptions& link) {
  if (link.bytes_per_second <= 0) return Clock::duration::zero();
  return std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(static_cast<double>(num_bytes) / link.bytes_per_second));
}

}  // namespace

void Mailbox::put(std::uint64_t epoch, const MessageId& id, Message message, std::size_t num_bytes,
                  const LinkOptions& link) {
  const bool instant = link.latency.count() <= 0 && link.bytes_per_second <= 0;
  {
    const std::lock_guard lock(mutex_);
    if (epoch < epoch_) return;
    if (epoch > epoch_) renew(epoch);
    Clock::time_point delivered_at{};
    if (!instant) {
      busy_until_ = std::max(busy_until_, Clock::now()) + transfer_time(num_bytes, link);
      delivered_at = busy_until_ + link.latency;
    }
    envelopes_.push_back(Envelope{{id, std::move(message)}, delivered_at});
  }
  cv_.notify_all();
}

Mailbox::Delivery Mailbox::take(std::uint64_t epoch, std::uint64_t number,
                                const FailureFlag& failure) {
  std::unique_lock lock(mutex_);
  std::optional<PreciseTimers> precise;
  while (true) {
    failure.throw_if_set();
    std::optional<Envelope>* found = find(epoch, number);
    if (found == nullptr) {
      cv_.wait(lock);
      continue;
    }
    const Clock::time_point delivered_at = (*found)->delivered_at;
    if (delivered_at == Clock::time_point{} || delivered_at <= Clock::now()) return remove(number);
    if (!precise) precise.emplace();
    cv_.wait_until(lock, delivered_at);
  }
}

void Mailbox::wake() {
  { const std::lock_guard lock(mutex_); }  // every taker is now before its check or asleep
  cv_.notify_all();
}

void Mailbox::renew(std::uint64_t epoch) {
  envelopes_.clear();
  epoch_ = epoch;
  first_ = 0;
  busy_until_ = {};
}

std::optional<Mailbox::Envelope>* Mailbox::find(std::uint64_t epoch, std::uint64_t number) {
  if (epoch != epoch_ || number < first_) return nullptr;
  const std::uint64_t index = number - first_;
  return index < envelopes_.size() ? &envelopes_[index] : nullptr;
}

Mailbox::Delivery Mailbox::remove(std::uint64_t number) {
  std::optional<Envelope>& slot = envelopes_[number - first_];
  Delivery delivery = std::move(slot->delivery);
  slot.reset();
  while (!envelopes_.empty() && !envelopes_.front()) {
    envelopes_.pop_front();
    ++first_;
  }
  return delivery;
}

}  // namespace dualpipe::loopback
