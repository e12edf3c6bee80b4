#include <chrono>
#include <deque>
#include <thread>
#include <utility>

#include "comm/copy_way.h"
#include "common/error.h"

namespace dualpipe {
namespace {

constexpr std::chrono::microseconds kPoll{20};

// The completion of a receive: its flag. A stream waits for it only if the message is late. If the
// way ends first, streams are released, since nothing may stay stuck, and the host gets an error.
class Receipt final : public Event {
 public:
  Receipt(std::shared_ptr<CopyMailbox> mailbox, std::uint32_t number)
      : mailbox_(std::move(mailbox)), number_(number) {}

  [[nodiscard]] bool done() const override {
    return mailbox_->has_reached(CopyMailbox::kArrived, number_);
  }
  void synchronize() const override {
    while (!done()) std::this_thread::sleep_for(kPoll);
    if (mailbox_->is_over()) {
      throw PipelineError("a message may not have come: one of its two ranks has given up");
    }
  }
  void hold_back(Stream& stream) const override {
    if (!done()) mailbox_->hold_back(stream, CopyMailbox::kArrived, number_);
  }

 private:
  const std::shared_ptr<CopyMailbox> mailbox_;
  const std::uint32_t number_;
};

// A receive is posted as soon as it is requested and the mailbox has room; the way's stream signals
// when the memory is free.
class IncomingWay final : public CopyWay {
 public:
  IncomingWay(std::shared_ptr<CopyBlocks> blocks, DeviceWay way, std::unique_ptr<Stream> stream,
              std::shared_ptr<CopyMailbox> mailbox, Queues queues)
      : CopyWay(std::move(way), std::move(stream), std::move(mailbox), queues),
        blocks_(std::move(blocks)) {}

  EventPtr transfer(const std::vector<Piece>& pieces, const EventPtr& ready) override {
    unready_.push_back(ready);
    for (const Piece& piece : pieces) {
      const auto [block, offset] = blocks_->find(piece.data);
      unposted_.push_back({block, offset, piece.num_bytes, &piece == &pieces.back()});
    }
    const auto receipt = std::make_shared<Receipt>(mailbox_, ++num_asked_);
    advance();
    return receipt;
  }

  void advance() override {
    while (!unposted_.empty() && mailbox_->post(unposted_.front())) unposted_.pop_front();
    while (!unready_.empty() && may_follow(unready_.front())) {
      stream_->wait(unready_.front());
      mailbox_->write(CopyMailbox::kReady, ++num_issued_, *stream_);
      unready_.pop_front();
    }
  }

  bool has_work() const override { return !unposted_.empty() || !unready_.empty(); }

 protected:
  std::uint32_t last_message() const override { return num_asked_; }
  void forget(const EventPtr&) noexcept override {
    unposted_.clear();
    unready_.clear();
  }
  void leave() noexcept override {}
  bool peer_is_through() const override {
    return mailbox_->peer_quiet() || !mailbox_->peer_came() || !mailbox_->peer_lives();
  }

 private:
  const std::shared_ptr<CopyBlocks> blocks_;
  std::uint32_t num_asked_ = CopyMailbox::kFirstMessage;
  std::deque<Posting> unposted_;
  std::deque<EventPtr> unready_;  // of messages whose memory may not be free yet
};

}  // namespace

std::unique_ptr<CopyWay> incoming_way(std::shared_ptr<CopyBlocks> blocks, DeviceWay way,
                                      std::unique_ptr<Stream> stream,
                                      std::shared_ptr<CopyMailbox> mailbox, Queues queues) {
  return std::make_unique<IncomingWay>(std::move(blocks), std::move(way), std::move(stream),
                                       std::move(mailbox), queues);
}

}  // namespace dualpipe
