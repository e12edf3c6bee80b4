#include "comm/copy_link.h"

#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "comm/copy_invitation.h"
#include "comm/copy_way.h"
#include "common/error.h"
#include "device/host_stream.h"

namespace dualpipe {
namespace {

using Clock = DeviceLink::Clock;

constexpr std::chrono::microseconds kBusyPoll{50};
constexpr std::chrono::microseconds kSharedPoll{20};  // where all messages wait on the host
constexpr unsigned long kTimerSlackNs = 1'000;        // by default sleeps may end 50 us late
constexpr std::chrono::milliseconds kIdlePoll{10};
constexpr std::chrono::seconds kPatience{10};  // for peers that may still use this rank's memory
constexpr std::size_t kScratchBytes = 512;

class CopyLink final : public DeviceLink {
 public:
  CopyLink(std::shared_ptr<CopyCalls> calls, std::shared_ptr<Device> device, Rank rank,
           Queues queues);
  ~CopyLink() override;

  Invitation invite() override;
  void connect(std::vector<DeviceWay> ways, const std::vector<Invitation>& invitations,
               Clock::duration timeout) override;
  EventPtr transfer(Index way, const std::vector<Piece>& pieces, const EventPtr& ready) override;
  bool progress() override;
  std::shared_ptr<Allocator> allocator() override { return blocks_; }
  std::optional<std::string> error(Index way, bool is_busy) override;
  void abort() noexcept override;
  void drain() override;

 private:
  using Lock = std::unique_lock<std::mutex>;

  void add_ways(std::vector<DeviceWay> ways, const std::vector<Invitation>& invitations);
  [[nodiscard]] std::shared_ptr<CopyMailbox> mailbox(const DeviceWay& way,
                                                     const Invitation& invitation);
  void carry_a_byte(Clock::time_point deadline);

  void watch();                    // runs on watcher_
  bool look_after_all() noexcept;  // returns whether nothing is left to do
  bool look_after(CopyWay& way) noexcept;
  [[nodiscard]] bool settled() noexcept;
  void leak();

  template <typename Call>
  auto noting_failures(const std::string& what, const Call& call);
  void require_alive() const;

  const std::shared_ptr<CopyCalls> calls_;
  const std::shared_ptr<Device> device_;
  const Rank rank_;
  const Queues queues_;
  const pid_t process_ = getpid();
  std::shared_ptr<CopyBlocks> blocks_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::map<std::string, std::shared_ptr<CopyMailbox>> invited_;  // by name
  std::vector<std::unique_ptr<CopyWay>> ways_;                   // does not change once connected_
  std::atomic<bool> connected_{false};
  std::exception_ptr failure_;  // the first one
  bool aborted_ = false;
  bool idle_ = false;  // nothing was left to do
  bool stopping_ = false;
  HostStream watcher_{"copy_link"};  // last: its task uses the members above
};

// The caller holds the lock.
template <typename Call>
auto CopyLink::noting_failures(const std::string& what, const Call& call) {
  const auto described = [&](const std::exception& error) {
    return cat("rank ", rank_, ": ", what, ": ", error.what());
  };
  try {
    try {
      return call();
    } catch (const UserError& error) {
      throw UserError(described(error));
    } catch (const PipelineError& error) {
      throw PipelineError(described(error));
    }
  } catch (const std::exception&) {
    if (!failure_) failure_ = std::current_exception();
    throw;
  }
}

CopyLink::CopyLink(std::shared_ptr<CopyCalls> calls, std::shared_ptr<Device> device, Rank rank,
                   Queues queues)
    : calls_(std::move(calls)),
      device_(std::move(device)),
      rank_(rank),
      queues_(queues),
      blocks_(std::make_shared<CopyBlocks>(calls_)) {
  watcher_.enqueue([this] { watch(); });
}

CopyLink::~CopyLink() {
  if (getpid() != process_) {  // a forked child: ways and memory belong to its parent
    leak();
    return;
  }
  abort();
  drain();
  const Lock lock(mutex_);
  stopping_ = true;
  wake_.notify_all();
  if (!settled()) leak();
}

void CopyLink::leak() {
  for (auto& way : ways_) (void)way.release();
  for (auto& [name, mailbox] : invited_) new std::shared_ptr<CopyMailbox>(mailbox);
  new std::shared_ptr<CopyBlocks>(blocks_);
}

Invitation CopyLink::invite() {
  auto mailbox = CopyMailbox::create(calls_);
  const Invitation invitation = invitation_to(mailbox->name());
  const Lock lock(mutex_);
  invited_.emplace(mailbox->name(), std::move(mailbox));
  return invitation;
}

void CopyLink::connect(std::vector<DeviceWay> ways, const std::vector<Invitation>& invitations,
                       Clock::duration timeout) {
  DUALPIPE_CHECK(ways.size() == invitations.size(), ways.size(), " ways, ", invitations.size(),
                 " invitations");
  {
    const Lock lock(mutex_);
    require_alive();
    DUALPIPE_CHECK(ways_.empty(), "connected twice");
    add_ways(std::move(ways), invitations);
  }
  connected_ = true;
  carry_a_byte(Clock::now() + timeout);
}

void CopyLink::add_ways(std::vector<DeviceWay> ways, const std::vector<Invitation>& invitations) {
  for (std::size_t i = 0; i < ways.size(); ++i) {
    DeviceWay& way = ways[i];
    noting_failures(way.name, [&] {
      auto box = mailbox(way, invitations[i]);
      auto stream = device_->new_stream();
      ways_.push_back(
          way.outgoing
              ? outgoing_way(calls_, std::move(way), std::move(stream), std::move(box), queues_)
              : incoming_way(blocks_, std::move(way), std::move(stream), std::move(box), queues_));
    });
  }
}

std::shared_ptr<CopyMailbox> CopyLink::mailbox(const DeviceWay& way, const Invitation& invitation) {
  if (way.peer < rank_) return CopyMailbox::open(calls_, name_in(invitation, way.peer));
  const auto own = invited_.extract(name_in(invitation, rank_));
  DUALPIPE_CHECK(!own.empty(), "an invitation of somebody else");
  return own.mapped();
}

// Sends a byte over each way, so that what cannot work between two devices fails here and not in
// the first step.
void CopyLink::carry_a_byte(Clock::time_point deadline) {
  std::vector<EventPtr> ends;
  auto* place = static_cast<std::byte*>(blocks_->allocate(ways_.size() * kScratchBytes));
  for (Index way = 0; way < ways_.size(); ++way, place += kScratchBytes) {
    ends.push_back(transfer(way, {{place, 1}}, nullptr));
  }
  for (Index way = 0; way < ways_.size(); ++way) {
    while (!ends[way]->done()) {
      {
        const Lock lock(mutex_);
        require_alive();
        if (const auto loss = ways_[way]->loss()) {
          throw PipelineError(cat("rank ", rank_, ": ", ways_[way]->name(), ": ", *loss));
        }
        if (Clock::now() > deadline) {
          throw PipelineError(cat("rank ", rank_, " waited too long to connect ",
                                  ways_[way]->name(), "; does every rank run?"));
        }
      }
      std::this_thread::sleep_for(kBusyPoll);
    }
  }
}

EventPtr CopyLink::transfer(Index index, const std::vector<Piece>& pieces, const EventPtr& ready) {
  const Lock lock(mutex_);
  require_alive();
  CopyWay& way = *ways_.at(index);
  if (way.ended() || way.peer_ended()) {  // the end of this way alone
    throw PipelineError(cat("rank ", rank_, ": ", way.name(), ": ", way.peer_end()));
  }
  return noting_failures(way.name(), [&] {
    EventPtr end = way.transfer(pieces, ready);
    if (way.has_work() && std::exchange(idle_, false)) wake_.notify_all();
    return end;
  });
}

bool CopyLink::progress() {
  const Lock lock(mutex_);
  (void)look_after_all();
  if (queues_ == Queues::kShared || failure_) return true;
  return std::none_of(ways_.begin(), ways_.end(),
                      [](const auto& way) { return !way->ended() && way->has_work(); });
}

// Only tries the lock: its holder may be blocked by the device, as the watchdog must not be.
std::optional<std::string> CopyLink::error(Index index, bool) {
  const Lock lock(mutex_, std::try_to_lock);
  if (!lock || aborted_) return std::nullopt;
  try {
    require_alive();
  } catch (const std::exception& error) {
    return error.what();
  }
  if (ways_.empty()) return std::nullopt;  // not connected yet
  CopyWay& way = *ways_.at(index);
  const auto loss = way.loss();
  return loss ? std::optional(cat("rank ", rank_, ": ", way.name(), ": ", *loss)) : std::nullopt;
}

void CopyLink::abort() noexcept {
  // Release streams before taking the lock: its holder may be waiting for the device.
  if (connected_) {
    for (const auto& way : ways_) way->let_through();
  }
  const Lock lock(mutex_);
  aborted_ = true;
  for (const auto& way : ways_) way->end();
  for (const auto& [name, mailbox] : invited_) {  // no way of this rank uses these
    mailbox->mark_aborted();
    mailbox->mark_quiet();
  }
  idle_ = false;
  wake_.notify_all();
}

void CopyLink::drain() {
  const Clock::time_point deadline = Clock::now() + kPatience;
  while (Clock::now() < deadline) {
    {
      const Lock lock(mutex_);
      if (settled()) return;
    }
    std::this_thread::sleep_for(kBusyPoll);
  }
}

void CopyLink::watch() {
  if (queues_ == Queues::kShared) (void)prctl(PR_SET_TIMERSLACK, kTimerSlackNs);
  Lock lock(mutex_);
  while (!stopping_) {
    idle_ = look_after_all();
    if (idle_) {
      wake_.wait_for(lock, kIdlePoll, [this] { return stopping_ || !idle_; });
    } else {
      const auto poll = queues_ == Queues::kShared ? kSharedPoll : kBusyPoll;
      wake_.wait_for(lock, poll, [this] { return stopping_; });
    }
  }
}

bool CopyLink::look_after_all() noexcept {
  bool all_done = true;
  for (const auto& way : ways_) all_done = look_after(*way) && all_done;
  return all_done;
}

bool CopyLink::look_after(CopyWay& way) noexcept {
  if (way.peer_ended()) way.end();
  if (way.ended()) return way.settled();
  if (failure_) return true;
  try {
    noting_failures(way.name(), [&] { way.advance(); });
    return !way.has_work();
  } catch (const std::exception&) {
    return true;  // it is in failure_ now
  }
}

bool CopyLink::settled() noexcept {
  return std::all_of(ways_.begin(), ways_.end(), [](const auto& way) { return way->settled(); });
}

void CopyLink::require_alive() const {
  if (aborted_) throw PipelineError(cat("rank ", rank_, ": the link was aborted"));
  if (failure_) std::rethrow_exception(failure_);
}

}  // namespace

std::unique_ptr<DeviceLink> copy_link(std::shared_ptr<CopyCalls> calls,
                                      std::shared_ptr<Device> device, Rank rank, Queues queues) {
  return std::make_unique<CopyLink>(std::move(calls), std::move(device), rank, queues);
}

}  // namespace dualpipe
