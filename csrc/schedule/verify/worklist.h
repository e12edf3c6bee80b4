#pragma once

#include <vector>

#include "common/ids.h"

namespace dualpipe {

// Ranks that may be able to advance, each at most once.
class Worklist {
 public:
  explicit Worklist(int num_ranks) : queued_(static_cast<std::size_t>(num_ranks), 1) {
    for (int r = num_ranks - 1; r >= 0; --r) ranks_.emplace_back(r);
  }

  void push(Rank rank) {
    if (queued_[rank.index()]) return;
    queued_[rank.index()] = 1;
    ranks_.push_back(rank);
  }
  [[nodiscard]] bool empty() const { return ranks_.empty(); }
  Rank pop() {
    const Rank rank = ranks_.back();
    ranks_.pop_back();
    queued_[rank.index()] = 0;
    return rank;
  }

 private:
  std::vector<Rank> ranks_;
  std::vector<char> queued_;
};

}  // namespace dualpipe
