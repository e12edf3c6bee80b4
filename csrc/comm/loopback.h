#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "comm/control_plane.h"
#include "comm/transport.h"
#include "memory/buffer_pool.h"

namespace dualpipe {

// How a link delays messages. Used to test schedules on slow links.
struct LinkOptions {
  std::chrono::nanoseconds latency{0};
  double bytes_per_second = 0;  // 0: unlimited. A message occupies its channel for bytes/bandwidth
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

  // Called for every message that is sent; kFail throws PipelineError in the sender, kDrop loses
  // the message.
  using FaultInjector = std::function<Fault(Rank from, Rank to, const MessageId& id)>;
  virtual void inject(FaultInjector injector) = 0;

  // Exchanges small texts between all ranks, for the handshake at construction: each rank passes
  // its own and gets all, by rank. If a rank is missing after `timeout`, throws a PipelineError
  // that names it on all ranks, including late ones.
  [[nodiscard]] virtual std::vector<std::string> all_gather(Rank rank, const std::string& text,
                                                            std::chrono::milliseconds timeout) = 0;

  // Of the buffers that hold messages, for all ranks together.
  [[nodiscard]] virtual BufferPool::Statistics memory() const = 0;
};

}  // namespace dualpipe
