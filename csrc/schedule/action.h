#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "common/error.h"
#include "common/ids.h"

namespace dualpipe {

// What a rank does, in the grammar of torch.distributed.pipelining (docs/architecture.md,
// "Actions").
enum class Op : std::uint8_t {
  kForward,         // F
  kBackward,        // B = I + W
  kBackwardInput,   // I
  kBackwardWeight,  // W
  kOverlap,         // (0F7;7B13)OVERLAP_F_B, or with I once the W has been split off
  kSendForward,     // 3SEND_F12: the output of 3F12 leaves for stage 4
  kRecvForward,     // 3RECV_F12: the input of 3F12 is requested
  kSendBackward,    // 3SEND_B12: the input gradient of 3B12 leaves for stage 2
  kRecvBackward,    // 3RECV_B12: the output gradient of 3B12 is requested
  kReduceGrad,      // 3REDUCE_GRAD: stage 3's gradients are summed over its mirrors
};

[[nodiscard]] constexpr bool is_compute(Op op) { return op <= Op::kOverlap; }
[[nodiscard]] constexpr bool is_send(Op op) {
  return op == Op::kSendForward || op == Op::kSendBackward;
}
[[nodiscard]] constexpr bool is_recv(Op op) {
  return op == Op::kRecvForward || op == Op::kRecvBackward;
}

// One cell of a schedule. 16 bytes: schedules of 1024 ranks hold tens of millions of them.
class Action {
 public:
  constexpr Action(Op op, Stage stage, Microbatch microbatch)
      : microbatch_(microbatch.value()), stage_(narrow(stage)), op_(op) {}

  // forward and backward of different micro-batches as one action; backward_op is kBackward or
  // kBackwardInput.
  static constexpr Action overlap(Stage forward_stage, Microbatch forward_microbatch,
                                  Op backward_op, Stage backward_stage,
                                  Microbatch backward_microbatch) {
    Action action(Op::kOverlap, forward_stage, forward_microbatch);
    action.backward_op_ = backward_op;
    action.backward_stage_ = narrow(backward_stage);
    action.backward_microbatch_ = backward_microbatch.value();
    return action;
  }
  static constexpr Action reduce_grad(Stage stage) {
    return Action(Op::kReduceGrad, stage, Microbatch());
  }

  [[nodiscard]] constexpr Op op() const { return op_; }
  [[nodiscard]] constexpr Stage stage() const { return Stage(stage_); }
  [[nodiscard]] constexpr Microbatch microbatch() const { return Microbatch(microbatch_); }

  // The two halves of an overlapped pair as actions of their own.
  [[nodiscard]] constexpr Action forward_half() const {
    return Action(Op::kForward, stage(), microbatch());
  }
  [[nodiscard]] constexpr Action backward_half() const {
    return Action(backward_op_, Stage(backward_stage_), Microbatch(backward_microbatch_));
  }

  constexpr bool operator==(const Action&) const = default;

 private:
  static constexpr std::uint16_t narrow(Stage stage) {
    return static_cast<std::uint16_t>(stage.value());
  }

  std::int32_t microbatch_ = -1;
  std::int32_t backward_microbatch_ = -1;
  std::uint16_t stage_ = 0;
  std::uint16_t backward_stage_ = 0;
  Op op_;
  Op backward_op_ = Op::kBackward;
};

static_assert(sizeof(Action) == 16);

// Calls visit with the action, or with both halves of an overlapped pair, forward first.
template <typename Visit>
constexpr void for_each_part(const Action& action, Visit&& visit) {
  if (action.op() != Op::kOverlap) {
    visit(action);
    return;
  }
  visit(action.forward_half());
  visit(action.backward_half());
}

// Counts the micro-batches whose activations a rank holds, from F to the end of B or W, as its
// actions run. I frees none: weight gradients need the layers' inputs.
class LiveActivations {
 public:
  constexpr void add(const Action& action) {
    for_each_part(action, [&](const Action& part) {
      if (part.op() == Op::kForward && ++live_ > peak_) peak_ = live_;
      if (part.op() == Op::kBackward || part.op() == Op::kBackwardWeight) --live_;
    });
  }
  [[nodiscard]] constexpr int peak() const { return peak_; }

 private:
  int live_ = 0;
  int peak_ = 0;
};

// "F", "SEND_F", ... Throws InternalError on kOverlap: only the halves of a pair have names.
[[nodiscard]] std::string_view op_name(Op op);

// "3F12", "(0F7;7B13)OVERLAP_F_B", "3SEND_F12", "3REDUCE_GRAD", ...
[[nodiscard]] std::string to_string(const Action& action);

// Appends the same text to `out`.
void append_to(std::string& out, const Action& action);

// A malformed action text. column counts from 1 within the action's own text.
class ActionSyntaxError : public ScheduleError {
 public:
  ActionSyntaxError(std::size_t column, const std::string& problem)
      : ScheduleError(cat("column ", column, ": ", problem)), column_(column), problem_(problem) {}

  [[nodiscard]] std::size_t column() const { return column_; }
  [[nodiscard]] const std::string& problem() const { return problem_; }

 private:
  std::size_t column_;
  std::string problem_;
};

// The inverse of to_string. Strict: anything else throws ActionSyntaxError.
[[nodiscard]] Action parse_action(std::string_view text);

}  // namespace dualpipe
