#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "comm/transport.h"

namespace dualpipe {

// Sends and receives issued to a device that may not be done, by way and in order. Keeps what is
// sent until it has left. Thread-safe.
class InFlight {
 public:
  using Clock = std::chrono::steady_clock;

  struct Operation {
    MessageId id;
    EventPtr end;
    std::shared_ptr<void> owner;  // of what is sent; null for a receive
    Clock::time_point since;
    bool committed = false;
  };
  struct Overdue {
    std::size_t way;
    MessageId id;
  };

  explicit InFlight(std::size_t num_ways) : ways_(num_ways) {}

  void add(std::size_t way, const MessageId& id, EventPtr end, std::shared_ptr<void> owner);
  // How many operations of a way are not done.
  [[nodiscard]] std::size_t num_of(std::size_t way);
  // Forgets operations that are done; returns how many are left.
  std::size_t forget_done();
  void clear();

  // The step is done: what was issued so far belongs to it.
  void commit();
  // How many operations of steps that are done have yet to finish. Frees nothing.
  [[nodiscard]] std::size_t num_committed() const;

  [[nodiscard]] bool any() const;
  [[nodiscard]] bool any_of(std::size_t way) const;
  // The first operation that has taken `limit` or longer.
  [[nodiscard]] std::optional<Overdue> overdue(Clock::duration limit) const;

 private:
  void forget_done(std::size_t way);

  mutable std::mutex mutex_;
  std::vector<std::deque<Operation>> ways_;
};

}  // namespace dualpipe
