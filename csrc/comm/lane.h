#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace dualpipe {

// How large the messages of one channel, in one direction, have been: what both ends know, and so
// what the receiver posts and the sender may fill with one message. Messages are counted from 0 in
// each step. What a step taught counts from the next one on, because receives are posted ahead of
// the messages before them; commit() comes after both ends have finished the step.
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

}  // namespace dualpipe
