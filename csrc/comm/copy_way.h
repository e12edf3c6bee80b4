#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/copy_blocks.h"
#include "comm/copy_link.h"
#include "comm/copy_mailbox.h"
#include "comm/device_link.h"

namespace dualpipe {

// One way of a copy link, with its stream. Not thread-safe: the link's lock guards it, but not
// let_through() or the events that it returns, which need no lock.
//
// It ends once, by end(), whichever rank asks for it. Until it is settled, streams may wait in the
// mailbox and copies into the receiver's memory may be in flight.
class CopyWay {
 public:
  CopyWay(const CopyWay&) = delete;
  CopyWay& operator=(const CopyWay&) = delete;
  virtual ~CopyWay() = default;

  // Transfers one message. Issues at once what it can, the rest in advance().
  [[nodiscard]] virtual EventPtr transfer(const std::vector<Piece>& pieces,
                                          const EventPtr& ready) = 0;
  virtual void advance() = 0;
  [[nodiscard]] virtual bool has_work() const = 0;  // for advance()

  [[nodiscard]] const std::string& name() const { return name_; }
  // Why messages were lost, for example "rank 1 is gone: its process has ended"; none if all
  // messages had arrived before.
  [[nodiscard]] std::optional<std::string> loss() const;
  [[nodiscard]] std::string peer_end() const;
  [[nodiscard]] bool peer_ended() const { return mailbox_->peer_aborted(); }

  // Ends all waits in streams of either rank, and tells the peer.
  void let_through() noexcept;
  // The same, and what has not been issued never will be.
  void end() noexcept;
  [[nodiscard]] bool ended() const { return ended_; }
  // After end(): whether no stream of this rank waits here and nobody writes into its memory any
  // more. Call it until it returns true; each call also releases streams that have blocked again.
  [[nodiscard]] bool settled() noexcept;

 protected:
  CopyWay(DeviceWay way, std::unique_ptr<Stream> stream, std::shared_ptr<CopyMailbox> mailbox,
          Queues queues);

  // Whether work that comes after this event may be issued on the stream now.
  [[nodiscard]] bool may_follow(const EventPtr& event) const;

  // The number of the last message that transfer() was called for.
  [[nodiscard]] virtual std::uint32_t last_message() const = 0;
  // Drops messages that were not issued. Part of one may have been, so they end with `last`, the
  // end of the stream's work.
  virtual void forget(const EventPtr& last) noexcept = 0;
  virtual void leave() noexcept = 0;  // the stream has finished
  [[nodiscard]] virtual bool peer_is_through() const = 0;

  const Rank peer_;
  const Queues queues_;
  const std::string name_;
  const std::unique_ptr<Stream> stream_;
  const std::shared_ptr<CopyMailbox> mailbox_;
  std::atomic<std::uint32_t> num_issued_ = CopyMailbox::kFirstMessage;

 private:
  [[nodiscard]] bool is_through() const noexcept;

  bool ended_ = false;
  bool through_ = false;
  EventPtr last_;  // the end of the stream's work
};

// Sends from a device to where the receiver wants it.
[[nodiscard]] std::unique_ptr<CopyWay> outgoing_way(std::shared_ptr<CopyCalls> calls, DeviceWay way,
                                                    std::unique_ptr<Stream> stream,
                                                    std::shared_ptr<CopyMailbox> mailbox,
                                                    Queues queues);

// Receives into memory of `blocks`.
[[nodiscard]] std::unique_ptr<CopyWay> incoming_way(std::shared_ptr<CopyBlocks> blocks,
                                                    DeviceWay way, std::unique_ptr<Stream> stream,
                                                    std::shared_ptr<CopyMailbox> mailbox,
                                                    Queues queues);

}  // namespace dualpipe
