#pragma once

#include <compare>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "common/ids.h"
#include "device/device.h"
#include "memory/message.h"

namespace dualpipe {

// kMirrorLow, kMirrorHigh: gradients of the mirrored stages below and above the middle.
enum class MessageKind : std::uint8_t { kActivation, kGradient, kMirrorLow, kMirrorHigh };
inline constexpr int kNumMessageKinds = 4;

// Whether the two copies of a stage exchange such messages, in addition to the schedule's.
[[nodiscard]] constexpr bool is_mirror(MessageKind kind) {
  return kind == MessageKind::kMirrorLow || kind == MessageKind::kMirrorHigh;
}
// Which of a device's reduction streams reads such messages.
[[nodiscard]] constexpr std::size_t reduction_of(MessageKind kind) {
  return kind == MessageKind::kMirrorLow ? 0 : 1;
}

// A path for one kind of message, in one direction, between a rank and a peer.
struct MessageWay {
  Rank peer;
  MessageKind kind;
  bool outgoing;
  auto operator<=>(const MessageWay&) const = default;
};

// What a message is, as the schedule sees it. Messages between the same two ranks of one kind form
// a channel and arrive in the order in which they are sent; stage and micro-batch travel along and
// are checked. stage is the one that uses the data; for mirrors, microbatch is a bucket.
struct MessageId {
  MessageKind kind;
  Stage stage;
  Microbatch microbatch;

  bool operator==(const MessageId&) const = default;
};
[[nodiscard]] std::string to_string(
    const MessageId& id);  // "activation of micro-batch 12 for stage 3"

// What all ranks must agree on before a step's first message.
struct StepInfo {
  std::int64_t step = 0;             // counts everything that a rank runs, including exchanges
  std::uint64_t program_digest = 0;  // 0 is not a program
  std::string description;           // "dualpipe, 8 ranks, 20 micro-batches, training"
  std::uint64_t shapes = 0;          // a digest of this rank's input shapes; 0: no inputs
};

// Whether two ranks mean the same step of the same program.
[[nodiscard]] bool same_step(const StepInfo& one, const StepInfo& other);
// The error of a mismatch, the same text on both ranks.
[[nodiscard]] std::string describe_mismatch(Rank rank, const StepInfo& info, Rank other_rank,
                                            const StepInfo& other_info);

// Why a pipeline stopped. The text is complete: rank, action, original message.
struct Failure {
  Rank rank;              // the one at fault
  std::int64_t step = 0;  // the step that failed: StepInfo::step
  std::string text;
};

// A received message. Device transports return it before its bytes have arrived: only work that
// waits for `ready` may read them (null: they have).
struct Arrival {
  Message message;
  EventPtr ready;
};

// A requested message.
class PendingReceive {
 public:
  virtual ~PendingReceive() = default;
  // Host transports block until the message has arrived; device transports return at once, unless
  // they do not know its layout yet. Call it once. Throws PipelineError after abort().
  [[nodiscard]] virtual Arrival wait() = 0;
};

// Moves messages between the ranks of one pipeline. send, receive and wait may be called by
// several threads of the rank, each channel by one at a time; abort by any. Implementations pass
// the conformance suite tests/cpp/comm/conformance.h (threads) and tests/python/test_transport.py
// (processes, killed).
//
//   begin_step -> { send | receive -> wait }* -> end_step       the step is done on all ranks
//              \-> any call throws, or abort -> recover         the step failed on all ranks
class Transport {
 public:
  virtual ~Transport() = default;

  // Connects to the peers before the first step, if a transport has to. Blocks for them; all ranks
  // must call it, or none.
  virtual void connect() {}

  // Announces the step to the neighbours and, before the first message to or from each, checks that
  // they agree. A mismatch is a UserError, with both descriptions, on the ranks that find it; the
  // engine tells the others. Does not block, unless a class says when it does.
  virtual void begin_step(const StepInfo& info) = 0;

  // Does not wait for the receiver, but for room where very many messages are under way, and on the
  // host for `ready`, which says when the bytes are final (null: now). The message is kept until it
  // has left, not longer; the returned event says when its bytes may change again (null: now).
  virtual EventPtr send(Rank to, const MessageId& id, Message message, const EventPtr& ready) = 0;

  // Requests the next message of the channel. Returns at once.
  [[nodiscard]] virtual std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) = 0;

  // Commits the step: returns when every rank has called it and this rank's sends have left, or,
  // for a device, have been issued.
  virtual void end_step() = 0;

  // Ends the step: every blocked or later call of this rank throws PipelineError(failure.text)
  // until recover(). The first failure counts.
  // May wait for some seconds for messages of earlier steps.
  virtual void abort(const Failure& failure) noexcept = 0;

  // Forgets the failed step: what was in flight reaches nobody. All ranks must call it.
  virtual void recover() = 0;

  // Whether messages are device memory, ordered by events, or host memory.
  [[nodiscard]] virtual bool carries_device_memory() const { return false; }

  // An asynchronous failure, not seen by any call, also between steps: for example, a device that
  // waits for a rank that is gone. Any thread.
  [[nodiscard]] virtual std::optional<std::string> fault() { return std::nullopt; }
  // Whether a device still works on issued messages. Any thread.
  [[nodiscard]] virtual bool busy() { return false; }
};

// A transport of host memory, on which device transports are built.
class HostTransport : public Transport {
 public:
  // The smallest and the largest of all ranks' values, ignoring zeros (both 0: all are). agree() is
  // called within a step, equally often by all ranks, and blocks for them.
  struct Extremes {
    std::uint64_t smallest;
    std::uint64_t largest;
    bool operator==(const Extremes&) const = default;
  };
  [[nodiscard]] static Extremes merged(const Extremes& one, const Extremes& other);
  [[nodiscard]] virtual Extremes agree(std::uint64_t value) = 0;

  // Throws what has ended the step, if anything has. Any thread.
  virtual void throw_if_failed() const = 0;
};

}  // namespace dualpipe
