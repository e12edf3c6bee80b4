#include <array>

#include "common/error.h"
#include "schedule/verify/row_order.h"

namespace dualpipe {
namespace {

struct Need {
  Done done;
  Op op;
};

constexpr std::array kNeeds = {
    Need{kDidForward, Op::kForward},         Need{kDidInput, Op::kBackwardInput},
    Need{kDidWeight, Op::kBackwardWeight},   Need{kSentForward, Op::kSendForward},
    Need{kSentBackward, Op::kSendBackward},  Need{kAskedForward, Op::kRecvForward},
    Need{kAskedBackward, Op::kRecvBackward},
};

}  // namespace

void RowOrder::check_complete() {
  for (int s = 0; s < placement_.num_stages() && !findings_.full(); ++s) {
    for (int m = 0; m < placement_.num_microbatches(); ++m) {
      check_cell_complete(Stage(s), Microbatch(m));
    }
  }
}

void RowOrder::check_cell_complete(Stage stage, Microbatch microbatch) {
  const int missing = needed(stage, microbatch) & ~done(stage, microbatch);
  if (missing == 0) return;
  const Rank home = placement_.rank_of(stage, microbatch);
  for (const Need& need : kNeeds) {
    if (!(missing & need.done)) continue;
    findings_.add_row(home, cat(to_string(Action(need.op, stage, microbatch)), " is missing"));
  }
}

int RowOrder::needed(Stage stage, Microbatch microbatch) const {
  int bits = kDidForward | (has_backward_ ? kDidInput | kDidWeight : 0);
  if (form_ == Form::kCompute) return bits;
  const Rank home = placement_.rank_of(stage, microbatch);
  const auto elsewhere = [&](int other) {
    return other >= 0 && other < placement_.num_stages() &&
           placement_.rank_of(Stage(other), microbatch) != home;
  };
  if (elsewhere(stage.value() - 1)) bits |= kAskedForward | (has_backward_ ? kSentBackward : 0);
  if (elsewhere(stage.value() + 1)) bits |= kSentForward | (has_backward_ ? kAskedBackward : 0);
  return bits;
}

}  // namespace dualpipe
