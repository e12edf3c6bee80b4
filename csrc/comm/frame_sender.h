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
  bool split;          // header and body apart: the peer has not posted memory for both
  std::size_t number;  // in its channel and step
};

// Lets frames leave, in order for each peer and once the peer is open, and gives their memory back
// when they have left. Nothing here makes the caller of send() wait:
//   small frames are handed to the link at once, by the caller; finish() waits for them
//   large ones are handed over by the courier, because the copy into a socket takes long, and
//   waited for by the reaper, so that the next ones can use their memory
// The courier never waits for a peer's receive, and so holds up nobody; the reaper may.
class FrameSender {
 public:
  FrameSender(LinkSession& session, TagMaker tags, int num_ranks, const std::vector<Rank>& peers);

  [[nodiscard]] bool is_peer(Rank rank) const;

  // The main thread; all peers are closed afterwards.
  void begin(std::uint32_t epoch);
  // The courier: frames may leave for this peer from now on.
  void open(Rank peer);
  // Any thread, as are the following.
  void send(Rank to, Outgoing outgoing);
  // A send of the caller's own that finish() is to wait for.
  void note(Rank to, const MessageId& id, Operations::Handle handle, std::size_t num_bytes);
  // Waits until all that was sent has left.
  void finish();
  // After a failure: waits for the threads, forgets what has not left. Never throws.
  void clear() noexcept;

  // Tasks of the transport's own; they must not wait for a receive of a peer.
  [[nodiscard]] HostStream& courier() { return courier_; }

 private:
  struct Outbox {
    std::mutex mutex;
    bool open = false;
    bool draining = false;  // the courier is at work: whatever follows must queue behind it
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

  HostStream courier_{"dp_courier"};  // last: their threads use what is above
  HostStream reaper_{"dp_reaper"};
};

}  // namespace dualpipe
