#pragma once

#include <cstddef>
#include <vector>

#include "schedule/schedule.h"

namespace dualpipe {

// Dense numbers for the (stage, micro-batch) of one rank's stages: tables by rank stay small.
class LocalCells {
 public:
  LocalCells(const Placement& placement, Rank rank)
      : num_microbatches_(static_cast<std::size_t>(placement.num_microbatches())),
        slot_of_stage_(static_cast<std::size_t>(placement.num_stages()), 0) {
    for (Stage stage : placement.stages_of(rank)) slot_of_stage_[stage.index()] = num_slots_++;
  }

  [[nodiscard]] std::size_t operator()(const Action& part) const {
    return slot_of_stage_[part.stage().index()] * num_microbatches_ + part.microbatch().index();
  }
  [[nodiscard]] std::size_t size() const { return num_slots_ * num_microbatches_; }

 private:
  std::size_t num_microbatches_;
  std::size_t num_slots_ = 0;
  std::vector<std::size_t> slot_of_stage_;
};

// By cell: the last step of the row that computes on it; -1: none.
[[nodiscard]] inline std::vector<int> last_compute_steps(const std::vector<Action>& row,
                                                         const LocalCells& cells) {
  std::vector<int> last(cells.size(), -1);
  for (std::size_t step = 0; step < row.size(); ++step) {
    if (!is_compute(row[step].op())) continue;
    for_each_part(row[step],
                  [&](const Action& part) { last[cells(part)] = static_cast<int>(step); });
  }
  return last;
}

}  // namespace dualpipe
