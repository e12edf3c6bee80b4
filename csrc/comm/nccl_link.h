#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "comm/nccl_calls.h"
#include "common/ids.h"

namespace dualpipe {

// One way for data between this rank and another one: a communicator of the two and a stream that
// only it uses. What is issued is done in order; the peer must ask for it in the same order.
struct NcclWay {
  Rank peer;
  bool outgoing;
  std::string name;  // "activations from rank 2 to rank 3", for errors
};

struct NcclPiece {
  std::byte* data;
  std::size_t num_bytes;
};

// All ways of one rank. The first failure, or abort(), ends them together and for good.
// Thread-safe.
class NcclLink {
 public:
  using Clock = std::chrono::steady_clock;
  using Index = std::size_t;

  NcclLink(NcclCalls& calls, Device& device, Rank rank, NcclOptions options);
  ~NcclLink();
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;

  // Makes the communicators of all ways at once and lets each carry a byte, so that no later call
  // has to wait for a connection. Ways and ids in the same order for both ranks of a pair; ways are
  // numbered as they are given. Blocks for the peers, no longer than `timeout`, as does every later
  // call. Once.
  void connect(std::vector<NcclWay> ways, const std::vector<NcclUniqueId>& ids,
               Clock::duration timeout);

  // Issues the pieces of one message after `ready`; returns the event of their end. Waits until
  // NCCL has handed them to the stream, which it does on a thread of its own: never for the peer.
  [[nodiscard]] EventPtr transfer(Index way, const std::vector<NcclPiece>& pieces,
                                  const EventPtr& ready);

  // What a communicator reports by itself: a peer that is gone, a broken network.
  [[nodiscard]] std::optional<std::string> error();

  void abort() noexcept;
  // After abort(): waits until the streams are through with what was issued.
  void drain();

 private:
  struct Connection {
    NcclWay way;
    NcclHandle comm = nullptr;  // null: aborted
    std::unique_ptr<Stream> stream;
  };

  void init(const std::vector<NcclUniqueId>& ids);
  void carry_a_byte();
  void issue(const Connection& connection, const NcclPiece& piece);
  void settle_all(const char* what);
  void settle(const Connection& connection, const char* what);
  void check(NcclResult result, const char* what, const Connection* connection) const;
  void require_alive() const;
  [[nodiscard]] int index_of(Rank rank, Rank peer) const { return rank < peer ? 0 : 1; }
  [[noreturn]] void fail(NcclResult result, const std::string& what, NcclHandle comm) const;

  NcclCalls& calls_;
  Device& device_;
  const Rank rank_;
  const NcclOptions options_;

  Clock::duration timeout_{};
  std::shared_ptr<Allocator> allocator_;
  std::shared_ptr<void> scratch_;  // what the first bytes use; as long as a device may write there

  std::mutex mutex_;  // a communicator is aborted by one thread while another one may use it
  std::vector<Connection> connections_;
  bool aborted_ = false;
};

}  // namespace dualpipe
