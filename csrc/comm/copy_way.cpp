#include "comm/copy_way.h"

#include <exception>
#include <utility>

#include "common/error.h"

namespace dualpipe {

CopyWay::CopyWay(DeviceWay way, std::unique_ptr<Stream> stream,
                 std::shared_ptr<CopyMailbox> mailbox, Queues queues)
    : peer_(way.peer),
      queues_(queues),
      name_(std::move(way.name)),
      stream_(std::move(stream)),
      mailbox_(std::move(mailbox)) {}

bool CopyWay::may_follow(const EventPtr& event) const {
  return queues_ == Queues::kOwn || !event || event->done();
}

std::optional<std::string> CopyWay::loss() const {
  const bool is_gone = mailbox_->peer_came() && !mailbox_->peer_lives();
  if (!is_gone && !mailbox_->peer_aborted()) return std::nullopt;
  if (mailbox_->has_arrived(last_message())) return std::nullopt;
  return peer_end();
}

std::string CopyWay::peer_end() const {
  return mailbox_->peer_aborted() ? cat("rank ", peer_, " has ended its side")
                                  : cat("rank ", peer_, " is gone: its process has ended");
}

void CopyWay::let_through() noexcept {
  mailbox_->mark_aborted();
  mailbox_->release_all(num_issued_);
}

void CopyWay::end() noexcept {
  if (std::exchange(ended_, true)) return;
  let_through();
  try {
    last_ = stream_->record();
  } catch (const std::exception&) {
    // The device is broken: nothing runs on it any more.
  }
  forget(last_);
}

bool CopyWay::settled() noexcept {
  mailbox_->release_all(num_issued_);  // first: a stuck stream may block the query
  if (!through_) {
    through_ = is_through();
    if (through_) leave();
  }
  if (!through_ || !peer_is_through()) return false;
  mailbox_->release_all(num_issued_);  // the last flag that either stream wrote may block a stream
  return true;
}

bool CopyWay::is_through() const noexcept {
  try {
    return !last_ || last_->done();
  } catch (const std::exception&) {
    return true;  // the device is broken
  }
}

}  // namespace dualpipe
