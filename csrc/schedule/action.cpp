#include "schedule/action.h"

#include <array>
#include <limits>

#include "common/error.h"

namespace dualpipe {
namespace {

struct OpName {
  std::string_view text;
  Op op;
};

// Where one name is a prefix of another, the longer one comes first.
constexpr std::array kOpNames = {
    OpName{"SEND_F", Op::kSendForward},
    OpName{"RECV_F", Op::kRecvForward},
    OpName{"SEND_B", Op::kSendBackward},
    OpName{"RECV_B", Op::kRecvBackward},
    OpName{"REDUCE_GRAD", Op::kReduceGrad},
    OpName{"F", Op::kForward},
    OpName{"B", Op::kBackward},
    OpName{"I", Op::kBackwardInput},
    OpName{"W", Op::kBackwardWeight},
};
constexpr std::string_view kOverlapSuffix = ")OVERLAP_F_B";
constexpr std::int64_t kMaxStage = std::numeric_limits<std::uint16_t>::max() - 1;
constexpr std::int64_t kMaxMicrobatch = std::numeric_limits<std::int32_t>::max() - 1;

// Reads one action from the left; every error names the column (from 1) where it occurs.
class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Action parse() {
    Action action = take("(") ? parse_pair() : parse_single();
    if (at_ != text_.size()) fail("the end of the action");
    return action;
  }

 private:
  Action parse_single() {
    const Stage stage(parse_number("a stage number", kMaxStage));
    const Op op = parse_op();
    if (op == Op::kReduceGrad) return Action::reduce_grad(stage);
    return Action(op, stage, Microbatch(parse_number("a micro-batch number", kMaxMicrobatch)));
  }

  Action parse_pair() {
    const Action forward = parse_half("a forward such as 0F7", {Op::kForward, Op::kForward});
    if (!take(";")) fail("';'");
    const Action backward =
        parse_half("a backward such as 7B13 or 7I13", {Op::kBackward, Op::kBackwardInput});
    if (!take(kOverlapSuffix)) fail("')OVERLAP_F_B'");
    return Action::overlap(forward.stage(), forward.microbatch(), backward.op(), backward.stage(),
                           backward.microbatch());
  }

  Action parse_half(std::string_view expected, std::array<Op, 2> allowed) {
    const std::size_t start = at_;
    const Action half = parse_single();
    if (half.op() != allowed[0] && half.op() != allowed[1]) {
      at_ = start;
      fail(expected);
    }
    return half;
  }

  Op parse_op() {
    for (const OpName& name : kOpNames) {
      if (take(name.text)) return name.op;
    }
    fail("one of F, B, I, W, SEND_F, RECV_F, SEND_B, RECV_B, REDUCE_GRAD");
  }

  std::int32_t parse_number(std::string_view expected, std::int64_t limit) {
    const std::size_t start = at_;
    std::int64_t value = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      value = value * 10 + (text_[at_] - '0');
      if (value > limit) fail(cat(expected, " of at most ", limit));
    }
    const bool leading_zero = at_ - start > 1 && text_[start] == '0';
    if (at_ == start || leading_zero) {
      at_ = start;
      fail(leading_zero ? cat(expected, " without leading zeros") : std::string(expected));
    }
    return static_cast<std::int32_t>(value);
  }

  bool take(std::string_view token) {
    if (text_.substr(at_, token.size()) != token) return false;
    at_ += token.size();
    return true;
  }

  [[noreturn]] void fail(std::string_view expected) const {
    throw ActionSyntaxError(at_ + 1, cat("expected ", expected, " in \"", text_, "\""));
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

void append(std::string& out, const Action& action) {
  out += std::to_string(action.stage().value());
  out += op_name(action.op());
  if (action.op() != Op::kReduceGrad) out += std::to_string(action.microbatch().value());
}

}  // namespace

std::string_view op_name(Op op) {
  for (const OpName& name : kOpNames) {
    if (name.op == op) return name.text;
  }
  throw InternalError(cat("action with unknown operation ", static_cast<int>(op)));
}

std::string to_string(const Action& action) {
  std::string out;
  append_to(out, action);
  return out;
}

void append_to(std::string& out, const Action& action) {
  if (action.op() != Op::kOverlap) {
    append(out, action);
    return;
  }
  out += '(';
  append(out, action.forward_half());
  out += ';';
  append(out, action.backward_half());
  out += kOverlapSuffix;
}

Action parse_action(std::string_view text) { return Parser(text).parse(); }

}  // namespace dualpipe
