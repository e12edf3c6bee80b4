#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "comm/control_plane.h"
#include "comm/transport.h"
#include "memory/buffer_pool.h"

namespace dualpipe {

// What a link does to messages. Used to test schedules on slow links, and failures.
struct LinkOptions {
  std::chrono::nanoseconds latency{0};
  double bytes_per_second = 0;  // 0: unlimited. A message occupies its channel bytes/bandwidth long
};

enum class Fault : std::uint8_t { kNone, kFail, kDrop };

// The shared side of a loopback pipeline: mailboxes in memory for ranks that are threads of one
// process. Thread-safe. Every rank's transport and control plane keep it alive.
class LoopbackHub : public std::enable_shared_from_this<LoopbackHub> {
 public:
  [[nodiscard]] static std::shared_ptr<LoopbackHub> create(int num_ranks, LinkOptions link = {});
  virtual ~LoopbackHub() = default;

  [[nodiscard]] virtual std::unique_ptr<HostTransport> transport(Rank rank) = 0;
  [[nodiscard]] virtual std::unique_ptr<ControlPlane> control_plane(Rank rank) = 0;

  // Asked for every message that is sent; kFail throws PipelineError in the sender, kDrop loses
  // the message.
  using FaultInjector = std::function<Fault(Rank from, Rank to, const MessageId& id)>;
  virtual void inject(FaultInjector injector) = 0;

  // Exchange of small texts between all ranks (each calls it with its own; returns all, by rank):
  // the handshake at construction. Throws PipelineError on all ranks, also on those that come late,
  // when one is missing after `timeout`, and names it.
  [[nodiscard]] virtual std::vector<std::string> all_gather(Rank rank, const std::string& text,
                                                            std::chrono::milliseconds timeout) = 0;

  // Of the buffers that messages lie in, all ranks together.
  [[nodiscard]] virtual BufferPool::Statistics memory() const = 0;
};

}  // namespace dualpipe
