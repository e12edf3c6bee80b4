#include "comm/framed_transport.h"

#include <cstring>
#include <map>
#include <utility>

#include "comm/frame.h"
#include "comm/frame_sender.h"
#include "comm/framed_receive.h"
#include "comm/lane.h"
#include "comm/link_session.h"
#include "common/error.h"

namespace dualpipe {
namespace {

constexpr std::size_t kExtremesBytes = sizeof(HostTransport::Extremes);

HostTransport::Extremes extremes_at(const std::byte* bytes) {
  HostTransport::Extremes extremes;
  std::memcpy(&extremes, bytes, sizeof(extremes));
  return extremes;
}

class FramedTransport final : public HostTransport {
 public:
  FramedTransport(std::unique_ptr<ByteLink> link, FramedOptions options)
      : options_(std::move(options)),
        session_(std::move(link), options_.rank),
        step_{session_, TagMaker(options_.instance)},
        sender_(session_, step_.tags, options_.num_ranks, options_.peers) {}
  ~FramedTransport() override { stop("the transport is gone"); }

  void begin_step(const StepInfo& info) override;
  EventPtr send(Rank to, const MessageId& id, Message message, const EventPtr& ready) override;
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override;
  void end_step() override;
  void abort(const Failure& failure) noexcept override {
    session_.fail(FailureFlag::Kind::kPipeline, failure.text);
  }
  void recover() override;
  void throw_if_failed() const override { session_.throw_if_failed(); }
  Extremes agree(std::uint64_t value) override {
    return disseminate(Traffic::kAgree, value, "to agree on the step's shapes");
  }

 private:
  void greet(Rank peer, const StepInfo& info);
  void read_greeting(Rank peer, Operations::Handle handle, const StepInfo& own);
  Extremes disseminate(Traffic traffic, std::uint64_t value, const char* purpose);
  void stop(const char* why) noexcept;
  void check_peer(Rank peer, const MessageId& id) const;

  const FramedOptions options_;
  LinkSession session_;
  FramedReceive::Step step_;
  std::map<std::uint64_t, Lanes> programs_;  // by digest
  Lanes* lanes_ = nullptr;                   // of the current step; null: none
  FrameSender sender_;                       // last: its threads use the members above
};

void FramedTransport::begin_step(const StepInfo& info) {
  session_.throw_if_failed();
  DUALPIPE_CHECK(lanes_ == nullptr, "begin_step within a step");
  step_.number = info.step;
  lanes_ = &programs_.try_emplace(info.program_digest, options_.num_ranks).first->second;
  lanes_->restart();
  sender_.begin(step_.epoch);
  for (const Rank peer : options_.peers) greet(peer, info);
}

void FramedTransport::greet(Rank peer, const StepInfo& info) {
  const std::uint32_t tag = step_.tags(step_.epoch, Traffic::kGreeting);
  const auto incoming = session_.receive(peer, tag, kGreetingBytes);
  auto buffer = session_.acquire(kGreetingBytes);
  encode_greeting(info, buffer->data());
  const auto outgoing = session_.send(peer, tag, std::move(buffer), 0, kGreetingBytes);
  sender_.note(peer, {MessageKind::kActivation, Stage(), Microbatch()}, outgoing, kGreetingBytes);
  sender_.courier().enqueue([this, peer, incoming, info] {
    session_.unless_failed([&] { read_greeting(peer, incoming, info); });
  });
}

void FramedTransport::read_greeting(Rank peer, Operations::Handle handle, const StepInfo& own) {
  const auto buffer =
      session_.await(handle, [peer] { return cat("waits for rank ", peer, " to begin the step"); });
  const StepInfo theirs = decode_greeting(buffer->data());
  if (same_step(own, theirs)) return sender_.open(peer);
  session_.fail(FailureFlag::Kind::kUser, describe_mismatch(options_.rank, own, peer, theirs));
}

EventPtr FramedTransport::send(Rank to, const MessageId& id, Message message,
                               const EventPtr& ready) {
  session_.throw_if_failed();
  check_peer(to, id);
  if (ready) ready->synchronize();
  Lane& lane = lanes_->out(to, id.kind);
  const Lane::Place place = lane.next();
  const std::size_t num_bytes = frame_bytes(message.layout);
  const bool split = num_bytes > place.capacity;
  auto frame = session_.acquire(num_bytes);
  encode_frame(message, id, step_.number, split, frame->data());
  message = {};
  lane.record(place.number, num_bytes);
  sender_.send(to, {id, std::move(frame), num_bytes, split, place.number});
  return nullptr;
}

std::unique_ptr<PendingReceive> FramedTransport::receive(Rank from, const MessageId& id) {
  session_.throw_if_failed();
  check_peer(from, id);
  return std::make_unique<FramedReceive>(step_, from, id, lanes_->in(from, id.kind));
}

void FramedTransport::end_step() {
  session_.throw_if_failed();
  DUALPIPE_CHECK(lanes_ != nullptr, "end_step outside of a step");
  sender_.finish();
  (void)disseminate(Traffic::kCommit, 0, "to end the step");
  lanes_->commit();
  lanes_ = nullptr;
}

// In round k each rank sends what it knows to the rank 2^k after it; after the last round each has
// heard, directly or through others, from all. Some values arrive twice, which does not change the
// extremes.
HostTransport::Extremes FramedTransport::disseminate(Traffic traffic, std::uint64_t value,
                                                     const char* purpose) {
  const int num_ranks = options_.num_ranks;
  const std::uint32_t tag = step_.tags(step_.epoch, traffic);
  const auto at = [&](int offset) {
    return Rank((options_.rank.value() + offset + num_ranks) % num_ranks);
  };
  std::vector<Operations::Handle> incoming;
  for (int distance = 1; distance < num_ranks; distance *= 2) {
    incoming.push_back(session_.receive(at(-distance), tag, kExtremesBytes));
  }
  std::vector<Operations::Handle> outgoing;
  Extremes known{value, value};
  int distance = 1;
  for (const auto handle : incoming) {
    auto own = session_.acquire(kExtremesBytes);
    std::memcpy(own->data(), &known, kExtremesBytes);
    outgoing.push_back(session_.send(at(distance), tag, std::move(own), 0, kExtremesBytes));
    const auto theirs = session_.await(
        handle, [&, from = at(-distance)] { return cat("waits for rank ", from, " ", purpose); });
    known = merged(known, extremes_at(theirs->data()));
    distance *= 2;
  }
  for (const auto handle : outgoing)
    session_.await(handle, [&] { return cat("waits for its sends ", purpose); });
  return known;
}

void FramedTransport::recover() {
  stop("the step failed");
  programs_.clear();  // ranks that committed and ranks that did not must agree again
  lanes_ = nullptr;
  ++step_.epoch;
  session_.recover();
}

// When it returns, no thread has any work left.
void FramedTransport::stop(const char* why) noexcept {
  session_.fail(FailureFlag::Kind::kPipeline, why);
  sender_.clear();
}

void FramedTransport::check_peer(Rank peer, const MessageId& id) const {
  DUALPIPE_CHECK(lanes_ != nullptr, "the ", to_string(id), " outside of a step");
  DUALPIPE_CHECK(sender_.is_peer(peer), "the ", to_string(id), ": rank ", peer,
                 " is no peer of rank ", options_.rank);
}

}  // namespace

std::unique_ptr<HostTransport> framed_transport(std::unique_ptr<ByteLink> link,
                                                FramedOptions options) {
  return std::make_unique<FramedTransport>(std::move(link), std::move(options));
}

}  // namespace dualpipe
