#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/ids.h"
#include "device/device.h"

namespace dualpipe {

// One way for data between this rank and another one.
struct DeviceWay {
  Rank peer;
  bool outgoing;
  std::string name;  // "activations from rank 2 to rank 3", for errors
};

struct Piece {
  std::byte* data;
  std::size_t num_bytes;
};

// What the lower of two ranks tells the higher one, by way of the host, for each way between them.
using Invitation = std::array<char, 128>;

// All ways of one rank between devices, each with a stream that only it uses: what is issued is
// done in order, and the peer asks for it in the same order with the same sizes. The first failure,
// or abort(), ends all ways together and for good. Thread-safe; each way by one thread at a time.
class DeviceLink {
 public:
  using Clock = std::chrono::steady_clock;
  using Index = std::size_t;

  virtual ~DeviceLink() = default;

  // For one way to a higher rank.
  [[nodiscard]] virtual Invitation invite() = 0;

  // Connects all ways at once, so that no later call has to wait for a connection. Ways and
  // invitations in the same order for both ranks of a pair; ways are numbered as they are given.
  // Blocks for the peers, no longer than `timeout`. Once.
  virtual void connect(std::vector<DeviceWay> ways, const std::vector<Invitation>& invitations,
                       Clock::duration timeout) = 0;

  // Sends or receives the pieces of one message after `ready`; returns the event of their end.
  // Never waits for the peer. Memory to receive into is allocator()'s.
  [[nodiscard]] virtual EventPtr transfer(Index way, const std::vector<Piece>& pieces,
                                          const EventPtr& ready) = 0;

  // Issues what transfer() could not: a peer had not said where to. Whether the streams have now
  // all that they need from this rank's host, but for what waits for computation in shared queues.
  // Called often.
  virtual bool progress() { return true; }

  [[nodiscard]] virtual std::shared_ptr<Allocator> allocator() = 0;

  // What a way reports by itself: a peer that is gone, a broken network. A peer that is through
  // with everything may be gone: that is an error for messages in flight alone, which a link may
  // not know of by itself (is_busy).
  [[nodiscard]] virtual std::optional<std::string> error(Index way, bool is_busy) = 0;

  virtual void abort() noexcept = 0;
  // After abort(): waits until the streams are through with what was issued.
  virtual void drain() = 0;
};

// Makes a link, anew after every failure.
using LinkMaker = std::function<std::unique_ptr<DeviceLink>()>;

}  // namespace dualpipe
