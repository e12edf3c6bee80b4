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

// A path for data, in one direction, between this rank and a peer.
struct DeviceWay {
  Rank peer;
  bool outgoing;
  std::string name;  // "activations from rank 2 to rank 3", for errors
};

struct Piece {
  std::byte* data;
  std::size_t num_bytes;
};

// What the lower of two ranks sends the higher one, through host memory, for each way between them.
using Invitation = std::array<char, 128>;

// All device ways of one rank, each with a stream that only it uses: messages are transferred in
// the order in which they are issued, and the peer must issue its side of them in the same order
// with the same sizes. The first failure, or abort(), ends all ways together and for good.
// Thread-safe; each way by one thread at a time.
class DeviceLink {
 public:
  using Clock = std::chrono::steady_clock;
  using Index = std::size_t;

  virtual ~DeviceLink() = default;

  // For one way between this rank and a higher one.
  [[nodiscard]] virtual Invitation invite() = 0;

  // Connects all ways at once, so that no later call has to wait for a connection. Both ranks of a
  // pair give the ways and invitations between them in the same order; a way's index is its
  // position here. Blocks until the peers connect, no longer than `timeout`. Call it once.
  virtual void connect(std::vector<DeviceWay> ways, const std::vector<Invitation>& invitations,
                       Clock::duration timeout) = 0;

  // Sends or receives the pieces of one message after `ready`; returns the event of its completion.
  // Never waits for the peer. Memory to receive into must come from allocator().
  [[nodiscard]] virtual EventPtr transfer(Index way, const std::vector<Piece>& pieces,
                                          const EventPtr& ready) = 0;

  // Issues what transfer() could not because a peer had not posted its memory. Returns whether the
  // streams need nothing more from this rank's host, except for what waits for computation in
  // shared queues. Called often.
  virtual bool progress() { return true; }

  [[nodiscard]] virtual std::shared_ptr<Allocator> allocator() = 0;

  // An asynchronous error of a way: a peer that is gone, a broken network. A peer that has finished
  // everything may leave; that is an error only for messages in flight, which a link may not know
  // of by itself (is_busy: there are some).
  [[nodiscard]] virtual std::optional<std::string> error(Index way, bool is_busy) = 0;

  virtual void abort() noexcept = 0;
  // After abort(): waits until the streams have finished all issued work.
  virtual void drain() = 0;
};

// Makes a link; called again after every failure.
using LinkMaker = std::function<std::unique_ptr<DeviceLink>()>;

}  // namespace dualpipe
