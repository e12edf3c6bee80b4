#include "schedule/passes/passes.h"

namespace dualpipe {
namespace {

// The stage to whose weight gradients this action adds; invalid: none.
Stage accumulates(const Action& action) {
  const Action part = action.op() == Op::kOverlap ? action.backward_half() : action;
  const bool weights = part.op() == Op::kBackward || part.op() == Op::kBackwardWeight;
  return weights ? part.stage() : Stage();
}

std::vector<Action> with_reductions(const std::vector<Action>& row,
                                    const std::vector<Stage>& stages) {
  std::vector<std::size_t> last(stages.size(), row.size());
  for (std::size_t step = 0; step < row.size(); ++step) {
    const Stage stage = accumulates(row[step]);
    for (std::size_t i = 0; i < stages.size(); ++i) {
      if (stages[i] == stage) last[i] = step;
    }
  }
  std::vector<Action> out;
  out.reserve(row.size() + stages.size());
  for (std::size_t step = 0; step < row.size(); ++step) {
    out.push_back(row[step]);
    for (std::size_t i = 0; i < stages.size(); ++i) {
      if (last[i] == step) out.push_back(Action::reduce_grad(stages[i]));
    }
  }
  return out;
}

}  // namespace

Schedule place_reduce_grad(Schedule schedule) {
  const Placement placement = schedule.placement;
  for (int r = 0; r < placement.num_ranks(); ++r) {
    if (!placement.mirror_of(Rank(r)).valid()) continue;
    auto& row = schedule.rows[static_cast<std::size_t>(r)];
    row = with_reductions(row, placement.stages_of(Rank(r)));
  }
  return schedule;
}

}  // namespace dualpipe
