#pragma once

#include <cstddef>
#include <optional>

#include "schedule/action.h"
#include "schedule/placement.h"

namespace dualpipe {

enum class TransferKind : std::uint8_t { kActivation, kGradient };

// An ordered pair of ranks and a kind: messages arrive in the order in which they are sent.
struct Channel {
  Rank source;
  Rank destination;
  TransferKind kind = TransferKind::kActivation;

  bool operator==(const Channel&) const = default;
};

// What crosses the boundary between stages `boundary` and `boundary + 1` for a micro-batch: an
// activation upwards in stage number, or its gradient downwards. (Its bytes are a Message,
// memory/message.h, which has a MessageId, comm/transport.h.)
struct Transfer {
  TransferKind kind;
  Stage boundary;
  Microbatch microbatch;

  bool operator==(const Transfer&) const = default;
};

// The message that a part of a compute action (a pair has two: its halves) or a SEND produces, and
// the one that a part or a RECV consumes. None for a W, and at the ends of the pipeline.
[[nodiscard]] std::optional<Transfer> output_of(const Placement& placement, const Action& part);
[[nodiscard]] std::optional<Transfer> input_of(const Placement& placement, const Action& part);

// The channel a message goes through; source and destination are equal for a hand-over within a
// rank, which needs no message.
[[nodiscard]] Channel channel_of(const Placement& placement, const Transfer& message);

// Dense numbers for flat tables. Consecutive stages are on neighbouring ranks (modulo the number of
// ranks) in every placement, so a rank has at most four outgoing channels.
[[nodiscard]] std::size_t channel_index(const Placement& placement, const Channel& channel);
[[nodiscard]] inline std::size_t num_channels(const Placement& placement) {
  return static_cast<std::size_t>(placement.num_ranks()) * 4;
}
[[nodiscard]] std::size_t message_index(const Placement& placement, const Transfer& message);
[[nodiscard]] inline std::size_t num_messages(const Placement& placement) {
  return placement.num_cells() * 2;
}

[[nodiscard]] Action send_action(const Transfer& message);
[[nodiscard]] Action recv_action(const Transfer& message);

}  // namespace dualpipe
