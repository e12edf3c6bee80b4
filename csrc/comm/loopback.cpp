#include "comm/loopback.h"

#include <utility>

#include "comm/loopback_endpoint.h"
#include "comm/loopback_hub.h"
#include "common/error.h"

namespace dualpipe {
namespace loopback {
namespace {

class BoardControlPlane final : public ControlPlane {
 public:
  BoardControlPlane(std::shared_ptr<LoopbackHub> hub, FailureBoard& board, Rank rank)
      : hub_(std::move(hub)), board_(board), rank_(rank) {}

  void report(const Failure& failure) override { board_.report(rank_, failure); }
  std::optional<Failure> poll() override { return board_.poll(rank_); }
  void publish_position(const std::string& position) override {
    board_.publish_position(rank_, position);
  }
  std::vector<std::string> positions() override { return board_.positions(rank_); }
  void advance_epoch() override { board_.advance_epoch(rank_); }

 private:
  const std::shared_ptr<LoopbackHub> hub_;  // owns the board
  FailureBoard& board_;
  const Rank rank_;
};

}  // namespace

std::unique_ptr<ControlPlane> Hub::control_plane(Rank rank) {
  check_rank(rank);
  return std::make_unique<BoardControlPlane>(shared_from_this(), failures_, rank);
}

void Hub::check_rank(Rank rank) const {
  DUALPIPE_USER_CHECK(rank.valid() && rank.value() < num_ranks_, "rank ", rank,
                      " does not exist: this loopback pipeline has ranks 0 to ", num_ranks_ - 1);
}

std::unique_ptr<HostTransport> Hub::transport(Rank rank) {
  check_rank(rank);
  const std::lock_guard lock(mutex_);
  DUALPIPE_USER_CHECK(endpoints_[rank.index()] == nullptr, "rank ", rank,
                      " has a transport already: every rank takes its own, once");
  auto self = std::static_pointer_cast<Hub>(shared_from_this());
  auto endpoint = std::make_unique<Endpoint>(std::move(self), rank);
  endpoints_[rank.index()] = endpoint.get();
  return endpoint;
}

void Hub::leave(Rank rank) {
  const std::lock_guard lock(mutex_);
  endpoints_[rank.index()] = nullptr;
}

void Hub::inject(FaultInjector injector) {
  auto shared = injector ? std::make_shared<const FaultInjector>(std::move(injector)) : nullptr;
  {
    const std::lock_guard lock(mutex_);
    has_injector_ = shared != nullptr;
    injector_.swap(shared);
  }
  // The previous injector is destroyed here, without the lock: that may run user code.
}

Fault Hub::fault_of(Rank from, Rank to, const MessageId& id) {
  if (!has_injector_.load(std::memory_order_acquire)) return Fault::kNone;
  std::shared_ptr<const FaultInjector> injector;
  {
    const std::lock_guard lock(mutex_);
    injector = injector_;
  }
  return injector ? (*injector)(from, to, id) : Fault::kNone;
}

Mailbox& Hub::mailbox(Rank from, Rank to, MessageKind kind) {
  const std::size_t pair = from.index() * endpoints_.size() + to.index();
  return mailboxes_[pair * kNumMessageKinds + static_cast<std::size_t>(kind)];
}

void Hub::wake(Rank rank) {
  for (int from = 0; from < num_ranks_; ++from) {
    for (int kind = 0; kind < kNumMessageKinds; ++kind) {
      mailbox(Rank(from), rank, static_cast<MessageKind>(kind)).wake();
    }
  }
  steps.wake();
}

void Hub::refuse_step(std::uint64_t epoch, const std::string& why) {
  const std::lock_guard lock(mutex_);
  for (Endpoint* endpoint : endpoints_) {
    if (endpoint == nullptr || endpoint->epoch() != epoch) continue;
    endpoint->fail(FailureFlag::Kind::kUser, why);
  }
}

}  // namespace loopback

std::shared_ptr<LoopbackHub> LoopbackHub::create(int num_ranks, LinkOptions link) {
  DUALPIPE_USER_CHECK(num_ranks >= 1, "a loopback pipeline of ", num_ranks,
                      " ranks: at least 1 is needed");
  DUALPIPE_USER_CHECK(link.latency.count() >= 0 && link.bytes_per_second >= 0,
                      "a link's latency and bandwidth cannot be negative");
  return std::make_shared<loopback::Hub>(num_ranks, link);
}

}  // namespace dualpipe
