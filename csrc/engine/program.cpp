#include "engine/program.h"

#include <map>
#include <optional>
#include <set>

#include "common/error.h"
#include "schedule/channel.h"
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
  using Indices = std::map<std::size_t, int>;  // by message_index()

  Computation computation(const Action& action) {
    Computation result{.action = action};
    if (const auto input = input_of(placement_, action)) {
      const bool local = channel_of(placement_, *input).source == rank_;
      result.source = local ? Source::kSlot : Source::kReceive;
      result.index = take(local ? slots_ : receives_, *input, action);
    }
    if (const auto output = output_of(placement_, action)) {
      result.result_slot = num_slots_++;
      slots_[message_index(placement_, *output)] = result.result_slot;
    }
    return result;
  }

  void resolve_send(Instruction& instruction) {
    const Transfer sent = at_boundary(output_of(placement_, instruction.action), instruction);
    instruction.message = id_of(sent);
    instruction.peer = channel_of(placement_, sent).destination;
    instruction.index = take(slots_, sent, instruction.action);
  }

  void resolve_receive(Instruction& instruction) {
    const Transfer received = at_boundary(input_of(placement_, instruction.action), instruction);
    instruction.message = id_of(received);
    instruction.peer = channel_of(placement_, received).source;
    instruction.index = num_receives_++;
    receives_[message_index(placement_, received)] = instruction.index;
  }

  static Transfer at_boundary(const std::optional<Transfer>& message,
                              const Instruction& instruction) {
    DUALPIPE_CHECK(message, to_string(instruction.action), " crosses no boundary between stages");
    return *message;
  }

  // Messages are named by the stage that consumes them.
  static MessageId id_of(const Transfer& message) {
    return {.kind = message.kind == TransferKind::kActivation ? MessageKind::kActivation
                                                              : MessageKind::kGradient,
            .stage = recv_action(message).stage(),
            .microbatch = message.microbatch};
  }

  int take(Indices& from, const Transfer& message, const Action& action) {
    const auto found = from.find(message_index(placement_, message));
    DUALPIPE_CHECK(found != from.end(), to_string(action), " uses data that nobody made before it");
    const int index = found->second;
    from.erase(found);
    return index;
  }

  const Placement& placement_;
  Rank rank_;
  Indices receives_;
  Indices slots_;
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
