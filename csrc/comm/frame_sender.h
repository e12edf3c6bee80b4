#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "comm/frame.h"
#include "comm/link_session.h"
#include "comm/tags.h"
#include "device/host_stream.h"

namespace dualpipe {

// A message, ready to leave.
struct Outgoing {
  MessageId id;
  std::shared_ptr<Buffer> frame;
  std::size_t num_bytes;
  bool split;          // header and body apart: the peer has not posted enough memory for both
  std::size_t number;  // counted within its channel and step
};

// Sends frames, in order for each peer and once that peer is open, and returns their memory when
// they have left. send() never makes its caller wait:
//   small frames are handed to the link at once, by the caller; finish() waits for them
//   large ones are handed over by the courier thread, because copying into a socket takes long, and
//   waited for by the reaper thread, so that later ones can use their memory
// The courier never waits for a peer's receive, so it holds up nobody; the reaper may.
class FrameSender {
 public:
  FrameSender(LinkSession& session, TagMaker tags, int num_ranks, const std::vector<Rank>& peers);

  [[nodiscard]] bool is_peer(Rank rank) const;

  // Called by the main thread; afterwards all peers are closed.
  void begin(std::uint32_t epoch);
  // Called by the courier: from now on frames may leave for this peer.
  void open(Rank peer);
  // From any thread, like the calls below.
  void send(Rank to, Outgoing outgoing);
  // Registers a send of the caller's own, so that finish() waits for it.
  void note(Rank to, const MessageId& id, Operations::Handle handle, std::size_t num_bytes);
  // Waits until everything that was sent has left.
  void finish();
  // After a failure: waits for the threads and drops what has not left. Never throws.
  void clear() noexcept;

  // For tasks of the transport's own, which must not wait for a peer's receive.
  [[nodiscard]] HostStream& courier() { return courier_; }

 private:
  struct Outbox {
    std::mutex mutex;
    bool open = false;
    bool draining = false;  // the courier is sending: later frames must queue
    std::vector<Outgoing> waiting;
  };
  struct Sent {
    Rank to;
    MessageId id;
    Operations::Handle handle;
  };

  void drain(Rank to);
  void post(Rank to, const Outgoing& outgoing);
  void reap(const std::vector<Sent>& sent);

  LinkSession& session_;
  const TagMaker tags_;
  std::uint32_t epoch_ = 0;
  std::vector<std::unique_ptr<Outbox>> outboxes_;  // by rank; null: not a peer

  std::mutex small_mutex_;
  std::vector<Sent> small_;

  HostStream reaper_{"dp_reaper"};  // last: their threads use the members above
  HostStream courier_{"dp_courier"};
};

}  // namespace dualpipe
