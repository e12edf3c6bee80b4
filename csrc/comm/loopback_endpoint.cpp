#include "comm/loopback_endpoint.h"

#include <utility>

#include "comm/loopback_hub.h"
#include "common/error.h"

namespace dualpipe::loopback {
namespace {

class Receipt final : public PendingReceive {
 public:
  Receipt(Endpoint& endpoint, Rank from, const MessageId& id, std::uint64_t number)
      : endpoint_(endpoint), from_(from), id_(id), number_(number) {}
  Arrival wait() override { return {endpoint_.take(from_, id_, number_), nullptr}; }

 private:
  Endpoint& endpoint_;
  const Rank from_;
  const MessageId id_;
  const std::uint64_t number_;
};

}  // namespace

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

EventPtr Endpoint::send(Rank to, const MessageId& id, Message message, const EventPtr& ready) {
  failure_.throw_if_set();
  DUALPIPE_CHECK(in_step_, "the ", to_string(id), " is sent outside of a step");
  hub_->check_rank(to);
  const Fault fault = hub_->fault_of(rank_, to, id);
  if (fault == Fault::kDrop) return nullptr;
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
  return nullptr;
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
  (void)agree(0);
  ++num_steps_;
  num_meetings_ = 0;
  in_step_ = false;
}

HostTransport::Extremes Endpoint::agree(std::uint64_t value) {
  return hub_->steps.meet({epoch(), num_steps_, num_meetings_++}, value, failure_);
}

void Endpoint::abort(const Failure& failure) noexcept {
  fail(FailureFlag::Kind::kPipeline, failure.text);
}

void Endpoint::fail(FailureFlag::Kind kind, const std::string& text) {
  if (failure_.set(kind, text)) hub_->wake(rank_);
}

void Endpoint::recover() {
  const auto no_refusal = hub_->hold_refusals();  // of the failed epoch may come into the next one
  ++epoch_;
  num_steps_ = 0;
  num_meetings_ = 0;
  in_step_ = false;
  for (auto& counts : num_received_) counts.fill(0);
  failure_.clear();
}

}  // namespace dualpipe::loopback
