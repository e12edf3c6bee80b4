#include "comm/in_flight.h"

#include <utility>

namespace dualpipe {

void InFlight::add(std::size_t way, const MessageId& id, EventPtr end,
                   std::shared_ptr<void> owner) {
  const std::lock_guard lock(mutex_);
  ways_[way].push_back({id, std::move(end), std::move(owner), Clock::now()});
}

std::size_t InFlight::num_of(std::size_t way) {
  forget_done(way);
  const std::lock_guard lock(mutex_);
  return ways_[way].size();
}

std::size_t InFlight::forget_done() {
  std::size_t num_left = 0;
  for (std::size_t way = 0; way < ways_.size(); ++way) num_left += num_of(way);
  return num_left;
}

void InFlight::forget_done(std::size_t way) {
  std::deque<Operation> done;  // freed after the lock: tensors may need the interpreter lock
  const std::lock_guard lock(mutex_);
  std::deque<Operation>& operations = ways_[way];
  while (!operations.empty() && operations.front().end->done()) {
    done.push_back(std::move(operations.front()));
    operations.pop_front();
  }
}

void InFlight::clear() {
  for (std::deque<Operation>& operations : ways_) {
    std::deque<Operation> forgotten;  // freed after the lock, as above
    const std::lock_guard lock(mutex_);
    operations.swap(forgotten);
  }
}

void InFlight::commit() {
  const std::lock_guard lock(mutex_);
  for (std::deque<Operation>& operations : ways_) {
    for (Operation& operation : operations) operation.committed = true;
  }
}

std::size_t InFlight::num_committed() const {
  std::size_t count = 0;
  const std::lock_guard lock(mutex_);
  for (const std::deque<Operation>& operations : ways_) {
    for (const Operation& operation : operations) {
      if (operation.committed && !operation.end->done()) ++count;
    }
  }
  return count;
}

bool InFlight::any() const {
  for (std::size_t way = 0; way < ways_.size(); ++way) {
    if (any_of(way)) return true;
  }
  return false;
}

bool InFlight::any_of(std::size_t way) const {
  const std::lock_guard lock(mutex_);
  return !ways_[way].empty() && !ways_[way].back().end->done();
}

std::optional<InFlight::Overdue> InFlight::overdue(Clock::duration limit) const {
  const std::lock_guard lock(mutex_);
  for (std::size_t way = 0; way < ways_.size(); ++way) {
    for (const Operation& operation : ways_[way]) {
      if (operation.end->done()) continue;
      if (Clock::now() - operation.since >= limit) return Overdue{way, operation.id};
      break;
    }
  }
  return std::nullopt;
}

}  // namespace dualpipe
