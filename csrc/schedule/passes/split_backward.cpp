#include "schedule/passes/passes.h"

namespace dualpipe {
namespace {

bool feeds_a_stage(const Action& part) {
  return part.op() == Op::kBackward && part.stage().value() > 0;
}

bool splits(const Action& action, bool split_pairs) {
  if (action.op() != Op::kOverlap) return feeds_a_stage(action);
  return split_pairs && feeds_a_stage(action.backward_half());
}

Action with_input_gradient_only(const Action& action, const Action& backward) {
  if (action.op() != Op::kOverlap) {
    return Action(Op::kBackwardInput, backward.stage(), backward.microbatch());
  }
  return Action::overlap(action.stage(), action.microbatch(), Op::kBackwardInput, backward.stage(),
                         backward.microbatch());
}

std::vector<Action> split_row(const std::vector<Action>& row, bool split_pairs) {
  std::vector<Action> out;
  out.reserve(row.size() * 2);
  for (const Action& action : row) {
    if (!splits(action, split_pairs)) {
      out.push_back(action);
      continue;
    }
    const Action backward = action.op() == Op::kOverlap ? action.backward_half() : action;
    out.push_back(with_input_gradient_only(action, backward));
    out.emplace_back(Op::kBackwardWeight, backward.stage(), backward.microbatch());
  }
  return out;
}

}  // namespace

Schedule split_backward(Schedule schedule, bool split_pairs) {
  for (auto& row : schedule.rows) row = split_row(row, split_pairs);
  return schedule;
}

}  // namespace dualpipe
