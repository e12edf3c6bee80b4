#pragma once

#include "schedule/schedule.h"

namespace dualpipe {

// Every pass is a function from schedule to schedule; rows keep their order of computation.

// Results leave before weights: a B whose input gradient another stage waits for (every stage but
// the first) becomes I, directly followed by its W; lower_communication then puts the send
// between them. split_pairs: a B in an overlapped pair is split as well.
[[nodiscard]] Schedule split_backward(Schedule schedule, bool split_pairs = true);

// Overlapped pairs become F, then B or I: for stages without an overlapped function of their own.
[[nodiscard]] Schedule serialize_overlap(Schedule schedule);

// Adds SEND_* right after what makes the data, and RECV_* `lookahead` compute actions ahead of
// their use (0: right before it), or earlier where needed to receive in the order in which the
// channel's source sends. A hand-over between two stages of one rank needs no message.
[[nodiscard]] Schedule lower_communication(Schedule schedule, int lookahead);

// Adds REDUCE_GRAD after the last W or B of each stage if stages have mirrors; otherwise the
// schedule stays as it is. Apply it before lower_communication, so that results leave first.
[[nodiscard]] Schedule place_reduce_grad(Schedule schedule);

// Removes backwards, messages of gradients and reductions: leaves what inference runs.
[[nodiscard]] Schedule forward_only(Schedule schedule);

struct LoweringOptions {
  bool keep_overlap = false;  // stages have an overlapped function: pairs stay in one piece
  bool with_backward = true;  // false: inference
  bool reduce_gradients = false;
  int lookahead = 2;  // compute actions
};

// Applies the passes above in the only right order.
[[nodiscard]] Schedule lower(Schedule schedule, const LoweringOptions& options);

}  // namespace dualpipe
