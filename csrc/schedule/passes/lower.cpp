#include "schedule/passes/passes.h"

namespace dualpipe {

// Pairs are serialized before backwards are split, so that a serial pair's W follows its I;
// reductions are placed before messages, so that a result leaves before the reduction starts.
Schedule lower(Schedule schedule, const LoweringOptions& options) {
  if (!options.with_backward) {
    return lower_communication(forward_only(std::move(schedule)), options.lookahead);
  }
  if (!options.keep_overlap) schedule = serialize_overlap(std::move(schedule));
  schedule = split_backward(std::move(schedule), !options.keep_overlap);
  if (options.reduce_gradients) schedule = place_reduce_grad(std::move(schedule));
  return lower_communication(std::move(schedule), options.lookahead);
}

}  // namespace dualpipe
