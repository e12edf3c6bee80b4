#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include "comm/transport.h"

namespace dualpipe {

// How large the messages of one channel, in one direction, have been. Both ends know this, so it is
// what the receiver posts and what the sender may fill with one message. Messages are counted from
// 0 in each step. Sizes seen in a step count from the next one on, because receives are posted
// before earlier messages have arrived; commit() comes after both ends have finished the step.
class Lane {
 public:
  static constexpr std::size_t kInitialBytes = 16'384;

  struct Place {
    std::size_t number;
    std::size_t capacity;  // bytes
  };
  [[nodiscard]] Place next() {
    if (next_ == capacities_.size()) {
      capacities_.push_back(kInitialBytes);
      seen_.push_back(0);
    }
    const std::size_t number = next_++;
    return {number, capacities_[number]};
  }

  void record(std::size_t number, std::size_t num_bytes) { seen_[number] = num_bytes; }

  void restart() { next_ = 0; }

  void commit() {
    for (std::size_t i = 0; i < next_; ++i) capacities_[i] = std::max(capacities_[i], seen_[i]);
  }

 private:
  std::size_t next_ = 0;
  std::vector<std::size_t> capacities_;
  std::vector<std::size_t> seen_;
};

// The lanes of one rank in one program. Each lane is used by one thread at a time.
class Lanes {
 public:
  explicit Lanes(int num_ranks) : out_(static_cast<std::size_t>(num_ranks)), in_(out_.size()) {}

  [[nodiscard]] Lane& out(Rank to, MessageKind kind) {
    return out_[to.index()][static_cast<std::size_t>(kind)];
  }
  [[nodiscard]] Lane& in(Rank from, MessageKind kind) {
    return in_[from.index()][static_cast<std::size_t>(kind)];
  }
  void restart() {
    for_each([](Lane& lane) { lane.restart(); });
  }
  void commit() {
    for_each([](Lane& lane) { lane.commit(); });
  }

 private:
  template <typename Function>
  void for_each(Function function) {
    for (auto* side : {&out_, &in_}) {
      for (auto& kinds : *side) std::for_each(kinds.begin(), kinds.end(), function);
    }
  }
  using Kinds = std::array<Lane, kNumMessageKinds>;
  std::vector<Kinds> out_;  // by peer
  std::vector<Kinds> in_;
};

}  // namespace dualpipe
