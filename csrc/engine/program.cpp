#include "engine/program.h"

#include <map>
#include <set>
#include <tuple>

#include "common/error.h"
#include "schedule/verify/verify.h"

namespace dualpipe {
namespace {

// Resolves the actions of one rank in program order.
class Resolver {
 public:
  Resolver(const Placement& placement, Rank rank) : placement_(placement), rank_(rank) {}

  Instruction resolve(const Action& action) {
    Instruction instruction{.action = action,
                            .first = {.action = action},
                            .second = {.action = action},
                            .peer = Rank()};
    switch (action.op()) {
      case Op::kForward:
      case Op::kBackward:
      case Op::kBackwardInput:
        instruction.first = computation(action);
        break;
      case Op::kOverlap:
        instruction.first = computation(action.forward_half());
        instruction.second = computation(action.backward_half());
        break;
      case Op::kSendForward:
      case Op::kSendBackward:
        resolve_send(instruction);
        break;
      case Op::kRecvForward:
      case Op::kRecvBackward:
        resolve_receive(instruction);
        break;
      case Op::kBackwardWeight:
      case Op::kReduceGrad:
        break;
    }
    return instruction;
  }

  [[nodiscard]] int num_slots() const { return num_slots_; }

 private:
  // Data is identified by its consumer: an activation or a gradient for (stage, micro-batch).
  using Key = std::tuple<MessageKind, Stage, Microbatch>;

  static bool is_forward(const Action& action) {
    return action.op() == Op::kForward || action.op() == Op::kSendForward ||
           action.op() == Op::kRecvForward;
  }
  static Stage neighbour(Stage stage, int offset) { return Stage(stage.value() + offset); }
  [[nodiscard]] bool exists(Stage stage) const {
    return stage.valid() && stage <= placement_.last_stage();
  }

  Computation computation(const Action& action) {
    const bool forward = is_forward(action);
    const auto kind = forward ? MessageKind::kActivation : MessageKind::kGradient;
    const Stage from = neighbour(action.stage(), forward ? -1 : 1);
    const Stage to = neighbour(action.stage(), forward ? 1 : -1);
    Computation result{.action = action};
    if (exists(from)) {
      const Key key{kind, action.stage(), action.microbatch()};
      const bool local = placement_.rank_of(from, action.microbatch()) == rank_;
      result.source = local ? Source::kSlot : Source::kReceive;
      result.index = take(local ? slots_ : receives_, key, action);
    }
    if (exists(to)) {
      result.result_slot = num_slots_++;
      slots_[{kind, to, action.microbatch()}] = result.result_slot;
    }
    return result;
  }

  void resolve_send(Instruction& instruction) {
    const Action& action = instruction.action;
    const bool forward = is_forward(action);
    const Stage to = neighbour(action.stage(), forward ? 1 : -1);
    instruction.message = {.kind = forward ? MessageKind::kActivation : MessageKind::kGradient,
                           .stage = to,
                           .microbatch = action.microbatch()};
    instruction.peer = placement_.rank_of(to, action.microbatch());
    instruction.index = take(slots_, {instruction.message.kind, to, action.microbatch()}, action);
  }

  void resolve_receive(Instruction& instruction) {
    const Action& action = instruction.action;
    const bool forward = is_forward(action);
    instruction.message = {.kind = forward ? MessageKind::kActivation : MessageKind::kGradient,
                           .stage = action.stage(),
                           .microbatch = action.microbatch()};
    const Stage from = neighbour(action.stage(), forward ? -1 : 1);
    instruction.peer = placement_.rank_of(from, action.microbatch());
    instruction.index = num_receives_++;
    receives_[{instruction.message.kind, action.stage(), action.microbatch()}] = instruction.index;
  }

  static int take(std::map<Key, int>& from, const Key& key, const Action& action) {
    const auto found = from.find(key);
    DUALPIPE_CHECK(found != from.end(), to_string(action), " uses data that nobody made before it");
    const int index = found->second;
    from.erase(found);
    return index;
  }

  const Placement& placement_;
  Rank rank_;
  std::map<Key, int> receives_;
  std::map<Key, int> slots_;
  int num_receives_ = 0;
  int num_slots_ = 0;
};

// A REDUCE_GRAD comes after the last computation that adds to its stage's gradients.
void mark_last_weights(std::vector<Instruction>& instructions) {
  std::map<Stage, Instruction*> last;
  for (Instruction& instruction : instructions) {
    const Action& action = instruction.action;
    if (action.op() == Op::kBackwardWeight) last[action.stage()] = &instruction;
    if (action.op() == Op::kBackward) last.erase(action.stage());
    if (action.op() == Op::kOverlap) last.erase(action.backward_half().stage());
    if (action.op() != Op::kReduceGrad) continue;
    const auto found = last.find(action.stage());
    if (found != last.end()) found->second->is_last_weight = true;
  }
}

}  // namespace

Program make_program(const Schedule& lowered, Rank rank, std::string description) {
  Program program;
  program.rank = rank;
  Resolver resolver(lowered.placement, rank);
  program.instructions.reserve(lowered.row(rank).size());
  for (const Action& action : lowered.row(rank)) {
    if (is_recv(action.op()))
      program.receives.push_back(static_cast<int>(program.instructions.size()));
    program.instructions.push_back(resolver.resolve(action));
  }
  mark_last_weights(program.instructions);
  program.num_slots = resolver.num_slots();
  program.planned_peak_activations = peak_live_activations(lowered, rank);
  program.digest = digest(lowered);
  program.description = std::move(description);
  return program;
}

std::vector<MessageWay> message_ways(const Program& program) {
  std::set<MessageWay> ways;
  for (const Instruction& instruction : program.instructions) {
    const Op op = instruction.action.op();
    if (!is_send(op) && !is_recv(op)) continue;
    ways.insert({instruction.peer, instruction.message.kind, is_send(op)});
  }
  return {ways.begin(), ways.end()};
}

Program make_reduce_program(Rank rank, const std::vector<Stage>& stages, std::string description) {
  Program program;
  program.rank = rank;
  program.digest = text_digest(description);
  program.description = std::move(description);
  for (const Stage stage : stages) {
    const Action action = Action::reduce_grad(stage);
    program.instructions.push_back({.action = action,
                                    .first = {.action = action},
                                    .second = {.action = action},
                                    .peer = Rank()});
  }
  return program;
}

}  // namespace dualpipe
