#include "comm/framed_transport.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>

#include "comm/failure_flag.h"
#include "comm/frame.h"
#include "comm/lane.h"
#include "comm/operations.h"
#include "common/error.h"
#include "device/host_stream.h"
#include "memory/buffer_pool.h"

namespace dualpipe {
namespace {

// 31 bits, as c10d has them: 1 (rarely used by others), instance, epoch, what travels, a number.
enum class Traffic : std::uint32_t { kFrame = 0, kBody = 4, kGreeting = 8, kCommit = 9 };

std::uint32_t make_tag(std::uint32_t instance, std::uint32_t epoch, Traffic traffic,
                       std::uint32_t kind = 0, std::uint32_t number = 0) {
  return 1u << 30 | (instance & 0xff) << 22 | (epoch & 0x3ff) << 12 |
         (static_cast<std::uint32_t>(traffic) + kind) << 8 | (number & 0xff);
}

// A send this large is waited for at once by the reaper, so that its memory can be used again; the
// end of the step waits for smaller ones, which costs no wake-up of a thread each.
constexpr std::size_t kLargeSendBytes = 65'536;
constexpr std::size_t kMaxSmallSends = 512;

constexpr std::size_t kCommitBytes = sizeof(std::int64_t);

struct Outgoing {
  MessageId id;
  std::shared_ptr<Buffer> frame;
  std::size_t num_bytes;
  bool split;
  std::uint32_t number;
};

// Frames for one peer: they wait until its greeting has agreed.
struct Outbox {
  std::mutex mutex;
  bool agreed = false;
  std::vector<Outgoing> waiting;
};

// The lanes of one program, by peer and kind.
struct Lanes {
  explicit Lanes(int num_ranks) : out(static_cast<std::size_t>(num_ranks)), in(out.size()) {}
  template <typename Function>
  void for_each(Function function) {
    for (auto* side : {&out, &in}) {
      for (auto& kinds : *side) std::for_each(kinds.begin(), kinds.end(), function);
    }
  }
  std::vector<std::array<Lane, kNumMessageKinds>> out;
  std::vector<std::array<Lane, kNumMessageKinds>> in;
};

class FramedTransport final : public Transport {
 public:
  FramedTransport(std::unique_ptr<ByteLink> link, FramedOptions options);
  ~FramedTransport() override;

  void begin_step(const StepInfo& info) override;
  void send(Rank to, const MessageId& id, Message message,
            const std::shared_ptr<Event>& ready) override;
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override;
  void end_step() override;
  void abort(const Failure& failure) noexcept override;
  void recover() override;

 private:
  class Receipt;

  struct Sent {
    Operations::Handle handle;
    MessageId id;
    Rank to;
  };

  Operations::Handle post_receive(Rank from, std::uint32_t tag, std::size_t capacity);
  Operations::Handle post_send(Rank to, std::uint32_t tag, std::shared_ptr<Buffer> buffer,
                               std::size_t offset, std::size_t num_bytes);
  template <typename Post>
  Operations::Handle add(Rank peer, std::shared_ptr<Buffer> buffer, const Post& post);
  // Returns the memory of an operation that is done; throws why this rank has failed otherwise.
  template <typename Describe>
  std::shared_ptr<Buffer> await(Operations::Handle handle, const Describe& describe);

  void greet(Rank peer);
  void read_greeting(Rank peer, Operations::Handle handle, const StepInfo& own);
  void open(Rank peer);
  void post(Rank to, Outgoing& outgoing);
  void note_sent(Sent sent, std::size_t num_bytes);
  void reap(const std::vector<Sent>& sent);
  void commit();

  void fail(FailureFlag::Kind kind, const std::string& text) noexcept;
  void stop(const std::string& why) noexcept;
  void check_peer(Rank peer, const MessageId& id) const;
  [[nodiscard]] std::uint32_t tag(Traffic traffic, MessageKind kind = MessageKind::kActivation,
                                  std::size_t number = 0) const;

  const std::unique_ptr<ByteLink> link_;
  const FramedOptions options_;
  const Rank rank_;
  BufferPool pool_;
  FailureFlag failure_;
  Operations operations_{failure_};
  std::vector<std::unique_ptr<Outbox>> outboxes_;  // by rank; null: not a peer

  std::map<std::uint64_t, Lanes> programs_;  // by digest
  Lanes* lanes_ = nullptr;                   // of the step at work; null: none
  StepInfo info_;
  std::atomic<std::uint32_t> epoch_{0};

  std::mutex sent_mutex_;
  std::vector<Sent> small_sends_;

  HostStream greeter_{"dp_greeter"};  // last: their threads use what is above
  HostStream reaper_{"dp_reaper"};
};

class FramedTransport::Receipt final : public PendingReceive {
 public:
  Receipt(FramedTransport& transport, Rank from, const MessageId& id, Lane& lane)
      : transport_(transport), from_(from), id_(id), lane_(lane), place_(lane.next()) {
    handle_ =
        transport.post_receive(from, transport.tag(Traffic::kFrame, id.kind), place_.capacity);
    epoch_ = transport.epoch_;
  }

  Message wait() override {
    transport_.failure_.throw_if_set();
    DUALPIPE_CHECK(epoch_ == transport_.epoch_, "a receive of a failed step is waited for");
    const auto describe = [this] {
      return cat("waits for the ", to_string(id_), " from rank ", from_);
    };
    std::shared_ptr<Buffer> frame = transport_.await(handle_, describe);
    const FrameHeader header = decode_header(frame->data());
    check(header);
    lane_.record(place_.number, header.num_bytes);
    std::byte* body = frame->data() + sizeof(FrameHeader);
    if (header.split) {
      const auto handle =
          transport_.post_receive(from_, transport_.tag(Traffic::kBody, id_.kind, place_.number),
                                  header.num_bytes - sizeof(FrameHeader));
      frame = transport_.await(handle, describe);
      body = frame->data();
    }
    return decode_body(header, body, std::move(frame));
  }

 private:
  void check(const FrameHeader& header) const {
    if (message_id(header) == id_ && header.step == transport_.info_.step) return;
    throw PipelineError(cat("rank ", from_, " -> rank ", transport_.rank_, ": expected the ",
                            to_string(id_), " of step ", transport_.info_.step, ", got the ",
                            to_string(message_id(header)), " of step ", header.step,
                            ": a message between them was lost"));
  }

  FramedTransport& transport_;
  const Rank from_;
  const MessageId id_;
  Lane& lane_;
  const Lane::Place place_;
  Operations::Handle handle_;
  std::uint32_t epoch_;
};

FramedTransport::FramedTransport(std::unique_ptr<ByteLink> link, FramedOptions options)
    : link_(std::move(link)),
      options_(std::move(options)),
      rank_(options_.rank),
      outboxes_(static_cast<std::size_t>(options_.num_ranks)) {
  for (const Rank peer : options_.peers) {
    DUALPIPE_CHECK(peer.valid() && peer.value() < options_.num_ranks && peer != rank_, "rank ",
                   peer, " is no peer of rank ", rank_, " of ", options_.num_ranks);
    outboxes_[peer.index()] = std::make_unique<Outbox>();
  }
}

FramedTransport::~FramedTransport() { stop("the transport is gone"); }

void FramedTransport::begin_step(const StepInfo& info) {
  failure_.throw_if_set();
  DUALPIPE_CHECK(lanes_ == nullptr, "begin_step within a step");
  info_ = info;
  lanes_ = &programs_.try_emplace(info.program_digest, options_.num_ranks).first->second;
  lanes_->for_each([](Lane& lane) { lane.restart(); });
  for (const Rank peer : options_.peers) outboxes_[peer.index()]->agreed = false;
  for (const Rank peer : options_.peers) greet(peer);
}

void FramedTransport::greet(Rank peer) {
  const auto incoming = post_receive(peer, tag(Traffic::kGreeting), kGreetingBytes);
  auto buffer = pool_.acquire(kGreetingBytes);
  encode_greeting(info_, buffer->data());
  const auto outgoing =
      post_send(peer, tag(Traffic::kGreeting), std::move(buffer), 0, kGreetingBytes);
  note_sent({outgoing, {}, peer}, kGreetingBytes);
  greeter_.enqueue([this, peer, incoming, own = info_] { read_greeting(peer, incoming, own); });
}

void FramedTransport::read_greeting(Rank peer, Operations::Handle handle, const StepInfo& own) {
  try {
    const auto buffer =
        await(handle, [&] { return cat("waits for rank ", peer, " to begin the step"); });
    const StepInfo theirs = decode_greeting(buffer->data());
    if (same_step(own, theirs)) {
      open(peer);
    } else {
      fail(FailureFlag::Kind::kUser, describe_mismatch(rank_, own, peer, theirs));
    }
  } catch (const PipelineError&) {
    // The flag is set: whoever uses the transport gets it.
  }
}

void FramedTransport::open(Rank peer) {
  Outbox& outbox = *outboxes_[peer.index()];
  const std::lock_guard lock(outbox.mutex);
  outbox.agreed = true;
  for (Outgoing& outgoing : outbox.waiting) post(peer, outgoing);
  outbox.waiting.clear();
}

void FramedTransport::send(Rank to, const MessageId& id, Message message,
                           const std::shared_ptr<Event>& ready) {
  failure_.throw_if_set();
  check_peer(to, id);
  if (ready) ready->synchronize();
  Lane& lane = lanes_->out[to.index()][static_cast<std::size_t>(id.kind)];
  const Lane::Place place = lane.next();
  const std::size_t num_bytes = frame_bytes(message.layout);
  const bool split = num_bytes > place.capacity;
  Outgoing outgoing{id, pool_.acquire(num_bytes), num_bytes, split,
                    static_cast<std::uint32_t>(place.number)};
  encode_frame(message, id, info_.step, split, outgoing.frame->data());
  message = {};
  lane.record(place.number, num_bytes);

  Outbox& outbox = *outboxes_[to.index()];
  const std::lock_guard lock(outbox.mutex);
  if (outbox.agreed) {
    post(to, outgoing);
  } else {
    outbox.waiting.push_back(std::move(outgoing));
  }
}

void FramedTransport::post(Rank to, Outgoing& outgoing) {
  const auto& [id, frame, num_bytes, split, number] = outgoing;
  const std::size_t first_bytes = split ? sizeof(FrameHeader) : num_bytes;
  const auto first = post_send(to, tag(Traffic::kFrame, id.kind), frame, 0, first_bytes);
  note_sent({first, id, to}, first_bytes);
  if (!split) return;
  const std::size_t rest_bytes = num_bytes - first_bytes;
  const auto rest =
      post_send(to, tag(Traffic::kBody, id.kind, number), frame, first_bytes, rest_bytes);
  note_sent({rest, id, to}, rest_bytes);
}

void FramedTransport::note_sent(Sent sent, std::size_t num_bytes) {
  std::vector<Sent> batch;
  {
    const std::lock_guard lock(sent_mutex_);
    if (num_bytes < kLargeSendBytes) {
      small_sends_.push_back(sent);
      if (small_sends_.size() < kMaxSmallSends) return;
      batch.swap(small_sends_);
    } else {
      batch.push_back(sent);
    }
  }
  reaper_.enqueue([this, batch = std::move(batch)] { reap(batch); });
}

void FramedTransport::reap(const std::vector<Sent>& sent) {
  for (const Sent& one : sent) {
    try {
      await(one.handle, [&] { return cat("sends the ", to_string(one.id), " to rank ", one.to); });
    } catch (const PipelineError&) {
      return;  // the flag is set
    }
  }
}

std::unique_ptr<PendingReceive> FramedTransport::receive(Rank from, const MessageId& id) {
  failure_.throw_if_set();
  check_peer(from, id);
  Lane& lane = lanes_->in[from.index()][static_cast<std::size_t>(id.kind)];
  return std::make_unique<Receipt>(*this, from, id, lane);
}

void FramedTransport::end_step() {
  failure_.throw_if_set();
  DUALPIPE_CHECK(lanes_ != nullptr, "end_step outside of a step");
  greeter_.synchronize();
  std::vector<Sent> sent;
  {
    const std::lock_guard lock(sent_mutex_);
    sent.swap(small_sends_);
  }
  reap(sent);
  reaper_.synchronize();
  failure_.throw_if_set();
  commit();
  lanes_->for_each([](Lane& lane) { lane.commit(); });
  lanes_ = nullptr;
}

// In round k everybody tells the rank 2^k behind it; after the last round each has heard, by way of
// others, from all.
void FramedTransport::commit() {
  const int num_ranks = options_.num_ranks;
  std::vector<std::pair<Rank, Operations::Handle>> incoming;
  for (int distance = 1; distance < num_ranks; distance *= 2) {
    const Rank from((rank_.value() + num_ranks - distance) % num_ranks);
    incoming.emplace_back(from, post_receive(from, tag(Traffic::kCommit), kCommitBytes));
  }
  std::vector<Operations::Handle> outgoing;
  int distance = 1;
  for (const auto& [from, handle] : incoming) {
    const Rank to((rank_.value() + distance) % num_ranks);
    outgoing.push_back(
        post_send(to, tag(Traffic::kCommit), pool_.acquire(kCommitBytes), 0, kCommitBytes));
    await(handle, [from = from] { return cat("waits for rank ", from, " to end the step"); });
    distance *= 2;
  }
  for (const auto handle : outgoing) await(handle, [] { return "ends the step"; });
}

Operations::Handle FramedTransport::post_receive(Rank from, std::uint32_t tag,
                                                 std::size_t capacity) {
  auto buffer = pool_.acquire(capacity);
  std::byte* const data = buffer->data();
  return add(from, std::move(buffer), [&] { return link_->receive(from, tag, data, capacity); });
}

Operations::Handle FramedTransport::post_send(Rank to, std::uint32_t tag,
                                              std::shared_ptr<Buffer> buffer, std::size_t offset,
                                              std::size_t num_bytes) {
  std::byte* const data = buffer->data() + offset;
  return add(to, std::move(buffer), [&] { return link_->send(to, tag, data, num_bytes); });
}

template <typename Post>
Operations::Handle FramedTransport::add(Rank peer, std::shared_ptr<Buffer> buffer,
                                        const Post& post) {
  try {
    return operations_.add({post(), std::move(buffer)});
  } catch (const PipelineError& error) {
    fail(FailureFlag::Kind::kPipeline,
         cat("rank ", rank_, " cannot reach rank ", peer, ": ", error.what()));
  }
  failure_.throw_if_set();
  throw InternalError(cat("rank ", rank_, " cannot reach rank ", peer));
}

template <typename Describe>
std::shared_ptr<Buffer> FramedTransport::await(Operations::Handle handle,
                                               const Describe& describe) {
  try {
    if (handle->operation->wait()) return operations_.finish(handle);
  } catch (const PipelineError& error) {
    fail(FailureFlag::Kind::kPipeline, cat("rank ", rank_, " ", describe(), ": ", error.what()));
  }
  failure_.throw_if_set();
  throw InternalError(cat("rank ", rank_, " ", describe(), ": ended without a reason"));
}

void FramedTransport::abort(const Failure& failure) noexcept {
  fail(FailureFlag::Kind::kPipeline, failure.text);
}

void FramedTransport::fail(FailureFlag::Kind kind, const std::string& text) noexcept {
  if (failure_.set(kind, text)) operations_.abort_all();
}

// Both threads have nothing to do any more when it returns.
void FramedTransport::stop(const std::string& why) noexcept {
  fail(FailureFlag::Kind::kPipeline, why);
  for (HostStream* stream : {&greeter_, &reaper_}) {
    try {
      stream->synchronize();
    } catch (const std::exception&) {
      // Reported to whoever used the transport.
    }
  }
}

void FramedTransport::recover() {
  stop("the step failed");
  operations_.bury();
  for (const Rank peer : options_.peers) outboxes_[peer.index()]->waiting.clear();
  small_sends_.clear();
  programs_.clear();  // a rank that has committed and one that has not must agree again
  lanes_ = nullptr;
  ++epoch_;
  failure_.clear();
}

void FramedTransport::check_peer(Rank peer, const MessageId& id) const {
  DUALPIPE_CHECK(lanes_ != nullptr, "the ", to_string(id), " outside of a step");
  DUALPIPE_CHECK(peer.valid() && peer.value() < options_.num_ranks && outboxes_[peer.index()],
                 "the ", to_string(id), ": rank ", peer, " is no peer of rank ", rank_);
}

std::uint32_t FramedTransport::tag(Traffic traffic, MessageKind kind, std::size_t number) const {
  return make_tag(options_.instance, epoch_, traffic, static_cast<std::uint32_t>(kind),
                  static_cast<std::uint32_t>(number));
}

}  // namespace

std::unique_ptr<Transport> framed_transport(std::unique_ptr<ByteLink> link, FramedOptions options) {
  return std::make_unique<FramedTransport>(std::move(link), std::move(options));
}

}  // namespace dualpipe
