#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/loopback.h"
#include "comm/loopback_board.h"
#include "comm/loopback_mailbox.h"

namespace dualpipe::loopback {

class Endpoint;

// What all ranks share. Thread-safe.
class Hub final : public LoopbackHub {
 public:
  Hub(int num_ranks, LinkOptions link)
      : steps(num_ranks),
        link(link),
        num_ranks_(num_ranks),
        failures_(num_ranks),
        endpoints_(static_cast<std::size_t>(num_ranks), nullptr),
        mailboxes_(endpoints_.size() * endpoints_.size() * kNumMessageKinds) {}

  std::unique_ptr<HostTransport> transport(Rank rank) override;
  std::unique_ptr<ControlPlane> control_plane(Rank rank) override;
  void inject(FaultInjector injector) override;
  std::vector<std::string> all_gather(Rank rank, const std::string& text,
                                      std::chrono::milliseconds timeout) override {
    check_rank(rank);
    return failures_.all_gather(rank, text, timeout);
  }
  BufferPool::Statistics memory() const override { return pool.statistics(); }

  [[nodiscard]] Mailbox& mailbox(Rank from, Rank to, MessageKind kind);
  [[nodiscard]] Fault fault_of(Rank from, Rank to, const MessageId& id);
  void leave(Rank rank);
  void wake(Rank rank);  // whatever the rank is blocked in
  void refuse_step(std::uint64_t epoch, const std::string& why);
  // While it is held, no rank refuses a step.
  [[nodiscard]] std::unique_lock<std::mutex> hold_refusals() { return std::unique_lock(mutex_); }
  void check_rank(Rank rank) const;
  [[nodiscard]] int num_ranks() const { return num_ranks_; }

  BufferPool pool;
  StepBoard steps;
  const LinkOptions link;

 private:
  const int num_ranks_;
  FailureBoard failures_;
  std::mutex mutex_;  // an injector is neither copied, called nor destroyed under it
  std::vector<Endpoint*> endpoints_;  // by rank
  std::atomic<bool> has_injector_{false};
  std::shared_ptr<const FaultInjector> injector_;  // null: none
  std::vector<Mailbox> mailboxes_;
};

}  // namespace dualpipe::loopback
