#include "schedule/verify/row_order.h"

#include "common/error.h"
#include "schedule/channel.h"

namespace dualpipe {
namespace {

std::uint8_t message_bit(Op op) {
  switch (op) {
    case Op::kSendForward:
      return kSentForward;
    case Op::kSendBackward:
      return kSentBackward;
    case Op::kRecvForward:
      return kAskedForward;
    default:
      return kAskedBackward;
  }
}

}  // namespace

RowOrder::RowOrder(const Schedule& schedule, Form form, Findings& findings)
    : schedule_(schedule),
      placement_(schedule.placement),
      form_(form),
      findings_(findings),
      done_(placement_.num_cells(), 0),
      reduced_(static_cast<std::size_t>(placement_.num_stages()), -1) {}

void RowOrder::check_rows() {
  if (schedule_.rows.size() != static_cast<std::size_t>(placement_.num_ranks())) {
    findings_.add_row(Rank(0), cat("the schedule has ", schedule_.rows.size(), " rows for ",
                                   placement_.num_ranks(), " ranks"));
    return;
  }
  for (int r = 0; r < placement_.num_ranks() && !findings_.full(); ++r) check_row(Rank(r));
}

void RowOrder::check_row(Rank rank) {
  rank_ = rank;
  const std::vector<Action>& row = schedule_.row(rank);
  for (step_ = 0; step_ < row.size(); ++step_) check_action(row[step_]);
}

// Both halves of a pair are checked before either counts as done: they start together.
void RowOrder::check_action(const Action& action) {
  if (action.op() == Op::kReduceGrad) {
    check_reduce(action);
    return;
  }
  if (form_ == Form::kCompute && !is_compute(action.op())) {
    report("is a message; a schedule of compute actions has none");
    return;
  }
  bool placed = true;
  for_each_part(action, [&](const Action& part) { placed = check_place(part) && placed; });
  if (!placed) return;
  for_each_part(action, [&](const Action& part) { check_part(part); });
  for_each_part(action, [&](const Action& part) { mark(part); });
}

bool RowOrder::check_place(const Action& part) {
  if (!part.stage().valid() || part.stage().value() >= placement_.num_stages()) {
    report(cat("names stage ", part.stage(), "; stages are 0..", placement_.num_stages() - 1));
    return false;
  }
  if (!part.microbatch().valid() || part.microbatch().value() >= placement_.num_microbatches()) {
    report(cat("names micro-batch ", part.microbatch(), "; micro-batches are 0..",
               placement_.num_microbatches() - 1));
    return false;
  }
  const Rank home = placement_.rank_of(part.stage(), part.microbatch());
  if (home == rank_) return true;
  report(cat("belongs on rank ", home, ": in a ", to_string(placement_.kind()),
             " placement that is where stage ", part.stage(), " runs micro-batch ",
             part.microbatch()));
  return false;
}

void RowOrder::check_part(const Action& part) {
  switch (part.op()) {
    case Op::kForward:
      return check_forward(part);
    case Op::kBackward:
    case Op::kBackwardInput:
      return check_backward(part);
    case Op::kBackwardWeight:
      return check_weight(part);
    default:
      return check_message(part);
  }
}

void RowOrder::check_forward(const Action& part) {
  if (done(part.stage(), part.microbatch()) & kDidForward) report("is done twice");
  require_input(part, kAskedForward, kDidForward, part.stage().value() - 1);
}

void RowOrder::check_backward(const Action& part) {
  has_backward_ = true;
  const std::uint8_t done_before = done(part.stage(), part.microbatch());
  if (done_before & kDidInput) report("is done twice (B, or I, of one micro-batch)");
  if (!(done_before & kDidForward)) {
    report(cat("comes before ", to_string(Action(Op::kForward, part.stage(), part.microbatch()))));
  }
  require_input(part, kAskedBackward, kDidInput, part.stage().value() + 1);
}

void RowOrder::check_weight(const Action& part) {
  has_backward_ = true;
  const std::uint8_t done_before = done(part.stage(), part.microbatch());
  if (done_before & kDidWeight) report("is done twice (W, or a B that holds it)");
  if (!(done_before & kDidInput)) {
    report(cat("comes before ",
               to_string(Action(Op::kBackwardInput, part.stage(), part.microbatch()))));
  }
}

void RowOrder::require_input(const Action& part, std::uint8_t receive_bit,
                             std::uint8_t producer_bit, int producer_stage) {
  const auto input = input_of(placement_, part);
  if (!input) return;
  const Channel channel = channel_of(placement_, *input);
  if (channel.source == rank_) {
    if (done(Stage(producer_stage), part.microbatch()) & producer_bit) return;
    const Op producer = producer_bit == kDidForward ? Op::kForward : Op::kBackward;
    report(cat("comes before ",
               to_string(Action(producer, Stage(producer_stage), part.microbatch())),
               " on the same rank, whose result it needs"));
  } else if (form_ == Form::kLowered && !(done(part.stage(), part.microbatch()) & receive_bit)) {
    report(
        cat("needs what ", to_string(recv_action(*input)), " asks for, and that is not before it"));
  }
}

void RowOrder::check_message(const Action& part) {
  const bool sends = is_send(part.op());
  const auto message = sends ? output_of(placement_, part) : input_of(placement_, part);
  if (!message) return report("has no stage on the other side");
  const Channel channel = channel_of(placement_, *message);
  if (channel.source == channel.destination) {
    return report("stays on its rank: such a hand-over is no message");
  }
  const std::uint8_t done_before = done(part.stage(), part.microbatch());
  if (done_before & message_bit(part.op())) return report("is there twice");
  const bool gradient = message->kind == TransferKind::kGradient;
  has_backward_ = has_backward_ || gradient;
  const std::uint8_t computed = gradient ? kDidInput : kDidForward;
  if (sends && !(done_before & computed)) report("comes before the action that makes the data");
  if (!sends && (done_before & computed)) report("comes after the action that uses the data");
}

void RowOrder::check_reduce(const Action& action) {
  if (!action.stage().valid() || action.stage().value() >= placement_.num_stages()) {
    return report(
        cat("names stage ", action.stage(), "; stages are 0..", placement_.num_stages() - 1));
  }
  std::int32_t& reduced = reduced_[action.stage().index()];
  if (reduced == rank_.value()) report("is there twice");
  reduced = rank_.value();
}

void RowOrder::mark(const Action& part) {
  std::uint8_t& bits = done(part.stage(), part.microbatch());
  const bool weights = part.op() == Op::kBackward || part.op() == Op::kBackwardWeight;
  if (weights && reduced_[part.stage().index()] == rank_.value()) {
    report(cat("adds to weight gradients after ", to_string(Action::reduce_grad(part.stage()))));
  }
  switch (part.op()) {
    case Op::kForward:
      bits |= kDidForward;
      break;
    case Op::kBackward:
      bits |= kDidInput | kDidWeight;
      break;
    case Op::kBackwardInput:
      bits |= kDidInput;
      break;
    case Op::kBackwardWeight:
      bits |= kDidWeight;
      break;
    default:
      bits |= message_bit(part.op());
  }
}

void RowOrder::report(const std::string& text) {
  const Action& action = schedule_.row(rank_)[step_];
  findings_.add(rank_, step_, cat(to_string(action), " ", text));
}

}  // namespace dualpipe
