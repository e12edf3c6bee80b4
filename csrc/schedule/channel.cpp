#include "schedule/channel.h"

namespace dualpipe {
namespace {

std::optional<Transfer> message_at(const Placement& placement, TransferKind kind, int boundary,
                                   Microbatch microbatch) {
  if (boundary < 0 || boundary + 1 >= placement.num_stages()) return std::nullopt;
  return Transfer{kind, Stage(boundary), microbatch};
}

Stage upper(const Transfer& message) { return Stage(message.boundary.value() + 1); }

}  // namespace

std::optional<Transfer> output_of(const Placement& placement, const Action& part) {
  const int stage = part.stage().value();
  switch (part.op()) {
    case Op::kForward:
    case Op::kSendForward:
      return message_at(placement, TransferKind::kActivation, stage, part.microbatch());
    case Op::kBackward:
    case Op::kBackwardInput:
    case Op::kSendBackward:
      return message_at(placement, TransferKind::kGradient, stage - 1, part.microbatch());
    default:
      return std::nullopt;
  }
}

std::optional<Transfer> input_of(const Placement& placement, const Action& part) {
  const int stage = part.stage().value();
  switch (part.op()) {
    case Op::kForward:
    case Op::kRecvForward:
      return message_at(placement, TransferKind::kActivation, stage - 1, part.microbatch());
    case Op::kBackward:
    case Op::kBackwardInput:
    case Op::kRecvBackward:
      return message_at(placement, TransferKind::kGradient, stage, part.microbatch());
    default:
      return std::nullopt;
  }
}

Channel channel_of(const Placement& placement, const Transfer& message) {
  const Rank low = placement.rank_of(message.boundary, message.microbatch);
  const Rank high = placement.rank_of(upper(message), message.microbatch);
  if (message.kind == TransferKind::kActivation) return {low, high, message.kind};
  return {high, low, message.kind};
}

std::size_t channel_index(const Placement& placement, const Channel& channel) {
  const int source = channel.source.value();
  const int next = source + 1 == placement.num_ranks() ? 0 : source + 1;
  const std::size_t side = channel.destination.value() == next ? 0 : 1;
  const std::size_t kind = channel.kind == TransferKind::kActivation ? 0 : 2;
  return channel.source.index() * 4 + kind + side;
}

std::size_t message_index(const Placement& placement, const Transfer& message) {
  const std::size_t kind = message.kind == TransferKind::kActivation ? 0 : placement.num_cells();
  return kind + placement.cell(message.boundary, message.microbatch);
}

Action send_action(const Transfer& message) {
  if (message.kind == TransferKind::kActivation) {
    return Action(Op::kSendForward, message.boundary, message.microbatch);
  }
  return Action(Op::kSendBackward, upper(message), message.microbatch);
}

Action recv_action(const Transfer& message) {
  if (message.kind == TransferKind::kActivation) {
    return Action(Op::kRecvForward, upper(message), message.microbatch);
  }
  return Action(Op::kRecvBackward, message.boundary, message.microbatch);
}

}  // namespace dualpipe
