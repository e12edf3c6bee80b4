#include "comm/frame_sender.h"

#include <utility>

#include "common/error.h"

namespace dualpipe {
namespace {

constexpr std::size_t kLargeBytes = 262'144;
constexpr std::size_t kMaxSmall = 512;  // at this many, the reaper waits for them

}  // namespace

FrameSender::FrameSender(LinkSession& session, TagMaker tags, int num_ranks,
                         const std::vector<Rank>& peers)
    : session_(session), tags_(tags), outboxes_(static_cast<std::size_t>(num_ranks)) {
  for (const Rank peer : peers) {
    DUALPIPE_CHECK(peer.valid() && peer.value() < num_ranks && peer != session.rank(), "rank ",
                   peer, " is no peer of rank ", session.rank(), " of ", num_ranks);
    outboxes_[peer.index()] = std::make_unique<Outbox>();
  }
}

bool FrameSender::is_peer(Rank rank) const {
  return rank.valid() && rank.index() < outboxes_.size() && outboxes_[rank.index()] != nullptr;
}

void FrameSender::begin(std::uint32_t epoch) {
  epoch_ = epoch;
  for (const auto& outbox : outboxes_) {
    if (!outbox) continue;
    const std::lock_guard lock(outbox->mutex);
    outbox->open = false;
  }
}

void FrameSender::open(Rank peer) {
  Outbox& outbox = *outboxes_[peer.index()];
  {
    const std::lock_guard lock(outbox.mutex);
    outbox.open = true;
    outbox.draining = true;
  }
  drain(peer);
}

void FrameSender::send(Rank to, Outgoing outgoing) {
  Outbox& outbox = *outboxes_[to.index()];
  const std::lock_guard lock(outbox.mutex);
  if (outbox.open && !outbox.draining && outgoing.num_bytes < kLargeBytes) {
    return post(to, outgoing);
  }
  outbox.waiting.push_back(std::move(outgoing));
  if (!outbox.open || outbox.draining) return;
  outbox.draining = true;
  courier_.enqueue([this, to] { session_.unless_failed([&] { drain(to); }); });
}

void FrameSender::drain(Rank to) {
  Outbox& outbox = *outboxes_[to.index()];
  std::vector<Outgoing> batch;
  while (true) {
    {
      const std::lock_guard lock(outbox.mutex);
      batch.clear();
      batch.swap(outbox.waiting);
      outbox.draining = !batch.empty();
      if (batch.empty()) return;
    }
    for (const Outgoing& outgoing : batch) post(to, outgoing);
  }
}

void FrameSender::post(Rank to, const Outgoing& outgoing) {
  const auto& [id, frame, num_bytes, split, number] = outgoing;
  const std::size_t first_bytes = split ? sizeof(FrameHeader) : num_bytes;
  const std::uint32_t tag = tags_(epoch_, Traffic::kFrame, id.kind);
  note(to, id, session_.send(to, tag, frame, 0, first_bytes), first_bytes);
  if (!split) return;
  const std::size_t rest_bytes = num_bytes - first_bytes;
  const std::uint32_t body_tag = tags_(epoch_, Traffic::kBody, id.kind, number);
  note(to, id, session_.send(to, body_tag, frame, first_bytes, rest_bytes), rest_bytes);
}

void FrameSender::note(Rank to, const MessageId& id, Operations::Handle handle,
                       std::size_t num_bytes) {
  std::vector<Sent> batch;
  {
    const std::lock_guard lock(small_mutex_);
    if (num_bytes < kLargeBytes) {
      small_.push_back({to, id, handle});
      if (small_.size() < kMaxSmall) return;
      batch.swap(small_);
    } else {
      batch.push_back({to, id, handle});
    }
  }
  reaper_.enqueue(
      [this, batch = std::move(batch)] { session_.unless_failed([&] { reap(batch); }); });
}

void FrameSender::reap(const std::vector<Sent>& sent) {
  for (const Sent& one : sent) {
    session_.await(one.handle,
                   [&] { return cat("sends the ", to_string(one.id), " to rank ", one.to); });
  }
}

void FrameSender::finish() {
  courier_.synchronize();
  std::vector<Sent> sent;
  {
    const std::lock_guard lock(small_mutex_);
    sent.swap(small_);
  }
  reap(sent);
  reaper_.synchronize();
  session_.throw_if_failed();
}

void FrameSender::clear() noexcept {
  for (HostStream* stream : {&courier_, &reaper_}) {
    try {
      stream->synchronize();
    } catch (const std::exception&) {
      // A bug in one of our tasks, and the step has failed anyway.
    }
  }
  for (const auto& outbox : outboxes_) {
    if (!outbox) continue;
    const std::lock_guard lock(outbox->mutex);
    outbox->waiting.clear();
    outbox->draining = false;
  }
  const std::lock_guard lock(small_mutex_);
  small_.clear();
}

}  // namespace dualpipe
