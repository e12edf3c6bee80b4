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

// One way of a link that copies, with its stream. Not thread-safe: the link's lock guards it, but
// not the events that it gives, nor let_through().
//
// It ends once, by end(), whichever rank wants it. Until it is settled, streams may wait in the
// mailbox and copies may be on their way into the receiver's memory.
class CopyWay {
 public:
  CopyWay(const CopyWay&) = delete;
  CopyWay& operator=(const CopyWay&) = delete;
  virtual ~CopyWay() = default;

  // One message. Does at once what it can, the rest in advance().
  [[nodiscard]] virtual EventPtr transfer(const std::vector<Piece>& pieces,
                                          const EventPtr& ready) = 0;
  virtual void advance() = 0;
  [[nodiscard]] virtual bool has_work() const = 0;  // for advance()

  [[nodiscard]] const std::string& name() const { return name_; }
  // "rank 1 is gone: its process has ended"; nothing where all messages had come before.
  [[nodiscard]] std::optional<std::string> loss() const;
  [[nodiscard]] std::string peer_end() const;
  [[nodiscard]] bool peer_ended() const { return mailbox_->peer_aborted(); }

  // Whatever waits in a stream of either rank goes on. The peer is told.
  void let_through() noexcept;
  // The same, and what was not issued never will be.
  void end() noexcept;
  [[nodiscard]] bool ended() const { return ended_; }
  // After end(): whether no stream of this rank waits here and nobody writes into its memory any
  // more. Asked until it is so: helps those through that have got stuck again.
  [[nodiscard]] bool settled() noexcept;

 protected:
  CopyWay(DeviceWay way, std::unique_ptr<Stream> stream, std::shared_ptr<CopyMailbox> mailbox,
          Queues queues);

  // Whether what comes after this may be given to the stream.
  [[nodiscard]] bool may_follow(const EventPtr& event) const;

  // The number of the last message that was asked for.
  [[nodiscard]] virtual std::uint32_t last_message() const = 0;
  // What was not issued. Part of it may have been, so that it ends with the stream.
  virtual void forget(const EventPtr& last) noexcept = 0;
  virtual void leave() noexcept = 0;  // the stream is through
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
  EventPtr last_;  // of the stream
};

// From a device, to where its receiver says.
[[nodiscard]] std::unique_ptr<CopyWay> outgoing_way(std::shared_ptr<CopyCalls> calls, DeviceWay way,
                                                    std::unique_ptr<Stream> stream,
                                                    std::shared_ptr<CopyMailbox> mailbox,
                                                    Queues queues);

// Into memory of `blocks`.
[[nodiscard]] std::unique_ptr<CopyWay> incoming_way(std::shared_ptr<CopyBlocks> blocks,
                                                    DeviceWay way, std::unique_ptr<Stream> stream,
                                                    std::shared_ptr<CopyMailbox> mailbox,
                                                    Queues queues);

}  // namespace dualpipe
