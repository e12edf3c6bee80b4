#include "comm/loopback.h"

#include <array>
#include <utility>

#include "comm/loopback_board.h"
#include "comm/loopback_mailbox.h"
#include "common/error.h"

namespace dualpipe {
namespace loopback {
namespace {

class Hub;

// One rank's end. Its counters belong to the rank; what others touch is in the hub.
class Endpoint final : public Transport {
 public:
  Endpoint(std::shared_ptr<Hub> hub, Rank rank);
  ~Endpoint() override;

  void begin_step(const StepInfo& info) override;
  void send(Rank to, const MessageId& id, Message message,
            const std::shared_ptr<Event>& ready) override;
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override;
  void end_step() override;
  void abort(const Failure& failure) noexcept override;
  void recover() override;

  [[nodiscard]] Message take(Rank from, const MessageId& id, std::uint64_t number);
  void fail(FailureFlag::Kind kind, const std::string& text);
  [[nodiscard]] std::uint64_t epoch() const { return epoch_.load(std::memory_order_acquire); }

 private:
  const std::shared_ptr<Hub> hub_;
  const Rank rank_;
  FailureFlag failure_;
  std::atomic<std::uint64_t> epoch_{0};
  std::uint64_t num_steps_ = 0;  // in this epoch
  std::atomic<bool> in_step_{false};
  std::vector<std::array<std::uint64_t, kNumMessageKinds>> num_received_;  // by source
};

class Receipt final : public PendingReceive {
 public:
  Receipt(Endpoint& endpoint, Rank from, const MessageId& id, std::uint64_t number)
      : endpoint_(endpoint), from_(from), id_(id), number_(number) {}
  Message wait() override { return endpoint_.take(from_, id_, number_); }

 private:
  Endpoint& endpoint_;
  const Rank from_;
  const MessageId id_;
  const std::uint64_t number_;
};

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

class Hub final : public LoopbackHub {
 public:
  Hub(int num_ranks, LinkOptions link)
      : steps(num_ranks),
        link(link),
        num_ranks_(num_ranks),
        failures_(num_ranks),
        endpoints_(static_cast<std::size_t>(num_ranks), nullptr),
        mailboxes_(endpoints_.size() * endpoints_.size() * kNumMessageKinds) {}

  std::unique_ptr<Transport> transport(Rank rank) override;
  std::unique_ptr<ControlPlane> control_plane(Rank rank) override {
    check_rank(rank);
    return std::make_unique<BoardControlPlane>(shared_from_this(), failures_, rank);
  }
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
  void check_rank(Rank rank) const;
  [[nodiscard]] int num_ranks() const { return num_ranks_; }

  BufferPool pool;
  StepBoard steps;
  const LinkOptions link;

 private:
  const int num_ranks_;
  FailureBoard failures_;
  std::mutex mutex_;
  std::vector<Endpoint*> endpoints_;  // by rank
  std::atomic<bool> has_injector_{false};
  FaultInjector injector_;
  std::vector<Mailbox> mailboxes_;
};

void Hub::check_rank(Rank rank) const {
  DUALPIPE_USER_CHECK(rank.valid() && rank.value() < num_ranks_, "rank ", rank,
                      " does not exist: this loopback pipeline has ranks 0 to ", num_ranks_ - 1);
}

std::unique_ptr<Transport> Hub::transport(Rank rank) {
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
  const std::lock_guard lock(mutex_);
  has_injector_ = static_cast<bool>(injector);
  injector_ = std::move(injector);
}

Fault Hub::fault_of(Rank from, Rank to, const MessageId& id) {
  if (!has_injector_.load(std::memory_order_acquire)) return Fault::kNone;
  FaultInjector injector;
  {
    const std::lock_guard lock(mutex_);
    injector = injector_;
  }
  return injector ? injector(from, to, id) : Fault::kNone;
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

Endpoint::Endpoint(std::shared_ptr<Hub> hub, Rank rank)
    : hub_(std::move(hub)),
      rank_(rank),
      num_received_(static_cast<std::size_t>(hub_->num_ranks())) {}

Endpoint::~Endpoint() { hub_->leave(rank_); }

void Endpoint::begin_step(const StepInfo& info) {
  failure_.throw_if_set();
  const auto mismatch = hub_->steps.announce(rank_, {epoch(), num_steps_}, info);
  if (mismatch) {
    hub_->refuse_step(epoch(), *mismatch);
    failure_.throw_if_set();
  }
  in_step_ = true;
}

void Endpoint::send(Rank to, const MessageId& id, Message message,
                    const std::shared_ptr<Event>& ready) {
  failure_.throw_if_set();
  DUALPIPE_CHECK(in_step_, "the ", to_string(id), " is sent outside of a step");
  hub_->check_rank(to);
  const Fault fault = hub_->fault_of(rank_, to, id);
  if (fault == Fault::kDrop) return;
  if (fault == Fault::kFail) {
    throw PipelineError(
        cat("rank ", rank_, " -> rank ", to, ": the link failed on the ", to_string(id)));
  }
  if (ready) ready->synchronize();
  const std::size_t num_bytes = packed_bytes(message.layout);
  auto buffer = hub_->pool.acquire(num_bytes);
  pack(message, buffer->data());
  std::byte* const data = buffer->data();
  repoint(message, data, std::move(buffer));
  hub_->mailbox(rank_, to, id.kind).put(epoch(), id, std::move(message), num_bytes, hub_->link);
}

std::unique_ptr<PendingReceive> Endpoint::receive(Rank from, const MessageId& id) {
  failure_.throw_if_set();
  DUALPIPE_CHECK(in_step_, "the ", to_string(id), " is asked for outside of a step");
  hub_->check_rank(from);
  const auto number = num_received_[from.index()][static_cast<std::size_t>(id.kind)]++;
  return std::make_unique<Receipt>(*this, from, id, number);
}

Message Endpoint::take(Rank from, const MessageId& id, std::uint64_t number) {
  auto delivery = hub_->mailbox(from, rank_, id.kind).take(epoch(), number, failure_);
  if (delivery.id != id) [[unlikely]] {
    throw PipelineError(cat("rank ", from, " -> rank ", rank_, ": expected the ", to_string(id),
                            ", got the ", to_string(delivery.id),
                            ": a message between them was lost"));
  }
  return std::move(delivery.message);
}

void Endpoint::end_step() {
  DUALPIPE_CHECK(in_step_, "end_step outside of a step");
  hub_->steps.commit({epoch(), num_steps_}, failure_);
  ++num_steps_;
  in_step_ = false;
}

void Endpoint::abort(const Failure& failure) noexcept {
  fail(FailureFlag::Kind::kPipeline, failure.text);
}

void Endpoint::fail(FailureFlag::Kind kind, const std::string& text) {
  if (failure_.set(kind, text)) hub_->wake(rank_);
}

void Endpoint::recover() {
  ++epoch_;
  num_steps_ = 0;
  in_step_ = false;
  for (auto& counts : num_received_) counts.fill(0);
  failure_.clear();
}

}  // namespace
}  // namespace loopback

std::shared_ptr<LoopbackHub> LoopbackHub::create(int num_ranks, LinkOptions link) {
  DUALPIPE_USER_CHECK(num_ranks >= 1, "a loopback pipeline of ", num_ranks,
                      " ranks: at least 1 is needed");
  DUALPIPE_USER_CHECK(link.latency.count() >= 0 && link.bytes_per_second >= 0,
                      "a link's latency and bandwidth cannot be negative");
  return std::make_shared<loopback::Hub>(num_ranks, link);
}

}  // namespace dualpipe
