#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

#include "comm/copy_way.h"
#include "common/error.h"

namespace dualpipe {
namespace {

// The completion of a send; exists before the send is issued.
class Departure final : public Event {
 public:
  Departure(std::shared_ptr<CopyMailbox> mailbox, std::uint32_t number)
      : mailbox_(std::move(mailbox)), number_(number) {}

  // Avoids device calls, which might block: for what has arrived, and as long as the flags still
  // mean something.
  [[nodiscard]] bool done() const override {
    const bool arrived = mailbox_->has_reached(CopyMailbox::kArrived, number_);
    if (!mailbox_->is_over()) return arrived;
    if (mailbox_->has_arrived(number_)) return true;
    const std::lock_guard lock(mutex_);
    return settled_ && (!end_ || end_->done());
  }
  void synchronize() const override {
    std::unique_lock lock(mutex_);
    cv_.wait(lock, [this] { return settled_; });
    const EventPtr end = end_;
    lock.unlock();
    if (end) end->synchronize();
  }
  void hold_back(Stream& stream) const override {
    const std::lock_guard lock(mutex_);
    if (end_) return end_->hold_back(stream);
    if (!settled_) mailbox_->hold_back(stream, CopyMailbox::kArrived, number_);
  }

  // Nothing is left to issue, and the send ends with this event; null: it has ended.
  void settle(EventPtr end) {
    {
      const std::lock_guard lock(mutex_);
      end_ = std::move(end);
      settled_ = true;
    }
    cv_.notify_all();
  }

 private:
  const std::shared_ptr<CopyMailbox> mailbox_;
  const std::uint32_t number_;
  mutable std::mutex mutex_;
  mutable std::condition_variable cv_;
  bool settled_ = false;
  EventPtr end_;
};

// A send waits on the host until its receiver has posted where it goes, and is then issued; its
// stream waits until that memory is free. With shared queues the host waits for that as well: a
// waiting stream could block those that share its queue, and with them what it waits for.
class OutgoingWay final : public CopyWay {
 public:
  OutgoingWay(std::shared_ptr<CopyCalls> calls, DeviceWay way, std::unique_ptr<Stream> stream,
              std::shared_ptr<CopyMailbox> mailbox, Queues queues)
      : CopyWay(std::move(way), std::move(stream), std::move(mailbox), queues),
        calls_(std::move(calls)) {}

  EventPtr transfer(const std::vector<Piece>& pieces, const EventPtr& ready) override {
    auto departure = std::make_shared<Departure>(mailbox_, ++num_asked_);
    unissued_.push_back({pieces, ready, departure});
    advance();
    return departure;
  }

  void advance() override {
    while (!unissued_.empty() && has_targets(unissued_.front()) && may_issue(unissued_.front())) {
      issue(unissued_.front());
      unissued_.pop_front();
      copies_.clear();
    }
  }

  bool has_work() const override { return !unissued_.empty(); }

 protected:
  std::uint32_t last_message() const override { return num_asked_; }
  void forget(const EventPtr& last) noexcept override {
    for (const Unissued& message : unissued_) message.departure->settle(last);
    unissued_.clear();
  }

  // The receiver frees its memory only after this.
  void leave() noexcept override {
    for (const auto& [handle, block] : opened_) calls_->close_block(handle, block);
    opened_.clear();
    mailbox_->mark_quiet();
  }
  bool peer_is_through() const override { return true; }

 private:
  struct Unissued {
    std::vector<Piece> pieces;
    EventPtr ready;
    std::shared_ptr<Departure> departure;
  };

  // Whether all postings of the message are there.
  bool has_targets(const Unissued& message) {
    while (copies_.size() < message.pieces.size()) {
      const auto posting = mailbox_->take();
      if (!posting) return false;
      add_target(message.pieces, *posting);
    }
    return true;
  }

  [[nodiscard]] bool may_issue(const Unissued& message) const {
    return queues_ == Queues::kOwn || (has_room() && may_follow(message.ready));
  }

  // Whether the memory for the next message may be written.
  [[nodiscard]] bool has_room() const {
    return mailbox_->has_reached(CopyMailbox::kReady, num_issued_ + 1);
  }

  void add_target(const std::vector<Piece>& pieces, const Posting& posting) {
    const std::size_t index = copies_.size();
    const Piece& piece = pieces[index];
    const bool is_last = index + 1 == pieces.size();
    if (piece.num_bytes != posting.num_bytes || is_last != (posting.is_last != 0)) {
      const auto size = [](std::uint64_t num_bytes, bool last) {
        return cat(num_bytes, " bytes", last ? " and no more" : "");
      };
      throw PipelineError(cat("piece ", index, " of message ", num_issued_ - kFirst, " has ",
                              size(piece.num_bytes, is_last), "; rank ", peer_, " expects ",
                              size(posting.num_bytes, posting.is_last != 0)));
    }
    copies_.push_back({open(posting.block) + posting.offset, piece.data, piece.num_bytes});
  }

  std::byte* open(const BlockHandle& handle) {
    const auto found = opened_.find(handle);
    if (found != opened_.end()) return found->second;
    std::byte* const block = calls_->open_block(handle);
    opened_.emplace(handle, block);
    return block;
  }

  void issue(const Unissued& message) {
    stream_->wait(message.ready);
    if (!has_room()) mailbox_->wait(CopyMailbox::kReady, num_issued_ + 1, *stream_);
    calls_->copy(copies_, *stream_);
    mailbox_->write(CopyMailbox::kArrived, ++num_issued_, *stream_);
    message.departure->settle(stream_->record());
  }

  static constexpr std::uint32_t kFirst = CopyMailbox::kFirstMessage;

  const std::shared_ptr<CopyCalls> calls_;
  std::uint32_t num_asked_ = kFirst;
  std::deque<Unissued> unissued_;
  std::vector<Copy> copies_;  // of the next message, for the postings that are there
  std::map<BlockHandle, std::byte*> opened_;
};

}  // namespace

std::unique_ptr<CopyWay> outgoing_way(std::shared_ptr<CopyCalls> calls, DeviceWay way,
                                      std::unique_ptr<Stream> stream,
                                      std::shared_ptr<CopyMailbox> mailbox, Queues queues) {
  return std::make_unique<OutgoingWay>(std::move(calls), std::move(way), std::move(stream),
                                       std::move(mailbox), queues);
}

}  // namespace dualpipe
