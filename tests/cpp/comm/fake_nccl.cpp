#include "comm/fake_nccl.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "device/fake_device.h"

namespace dualpipe::testing {
namespace {

struct Transfer {
  void* data;
  std::size_t num_bytes;
  bool done = false;
};

// What two ranks share; the sides of a communicator are 0 and 1.
struct Pair {
  bool joined[2] = {false, false};
  bool warm[2] = {false, false};
  bool aborted[2] = {false, false};
  std::deque<std::shared_ptr<Transfer>> sends[2];     // by the side that sends
  std::deque<std::shared_ptr<Transfer>> receives[2];  // by the side that sends
};

struct Communicator {
  std::shared_ptr<Pair> pair;
  int side;
  int num_running = 0;  // messages that wait for the peer
};
using CommunicatorPtr = std::shared_ptr<Communicator>;

struct Issue {
  CommunicatorPtr comm;
  std::shared_ptr<Transfer> transfer;  // null: makes the communicator
  std::function<void()> launch;
};

thread_local int open_groups_of_thread = 0;
thread_local bool group_failed = false;  // one of its calls failed, so none takes effect
thread_local std::vector<Issue> grouped;

}  // namespace

struct FakeNcclWorld::State {
  std::mutex mutex;
  std::condition_variable cv;
  std::map<Invitation, std::shared_ptr<Pair>> pairs;
  std::map<std::string, std::pair<int, NcclResult>> faults;  // how many calls succeed before it
  std::uint64_t num_ids = 0;
  int num_open_groups = 0;
  int num_communicators = 0;
  int num_messages = 0;
  int num_stuck = 0;                  // threads in NCCL, waiting for a peer
  std::set<std::thread::id> blocked;  // in a full queue
  bool queues_are_full = false;
  bool broken = false;
  bool is_over = false;

  // The caller holds the lock. Waits for a peer as a blocking communicator does: forever.
  bool wait_for_peer(std::unique_lock<std::mutex>& lock, const std::function<bool()>& is_there) {
    ++num_stuck;
    cv.wait(lock, [&] { return is_there() || is_over; });
    --num_stuck;
    cv.notify_all();
    return !is_over;
  }

  // The caller holds the lock.
  void wait_for_room(std::unique_lock<std::mutex>& lock, const Communicator& comm,
                     const Transfer& transfer) {
    blocked.insert(std::this_thread::get_id());
    cv.wait(lock, [&] { return transfer.done || comm.pair->aborted[comm.side]; });
    blocked.erase(std::this_thread::get_id());
  }

  // The caller holds the lock. The fault that was set for this call, or success.
  NcclResult fault(const std::string& call) {
    const auto found = faults.find(call);
    if (found == faults.end() || found->second.first-- > 0) return NcclResult::kSuccess;
    const NcclResult result = found->second.second;
    faults.erase(found);
    return result;
  }

  // Runs on a stream: waits for the other side, as an NCCL kernel does, or for an abort.
  void run(const CommunicatorPtr& own, int sender, const std::shared_ptr<Transfer>& transfer) {
    std::unique_lock lock(mutex);
    const std::shared_ptr<Pair> pair = own->pair;
    const int own_side = own->side;
    ++own->num_running;
    (own_side == sender ? pair->sends : pair->receives)[sender].push_back(transfer);
    auto& sends = pair->sends[sender];
    auto& receives = pair->receives[sender];
    if (!sends.empty() && !receives.empty()) {
      EXPECT_EQ(sends.front()->num_bytes, receives.front()->num_bytes);
      std::memcpy(receives.front()->data, sends.front()->data, sends.front()->num_bytes);
      sends.front()->done = receives.front()->done = true;
      sends.pop_front();
      receives.pop_front();
      cv.notify_all();
    }
    cv.wait(lock, [&] { return transfer->done || pair->aborted[own_side]; });
    // An aborted transfer must not be matched any more: its memory may be gone.
    if (!transfer->done) std::erase(own_side == sender ? sends : receives, transfer);
    --own->num_running;
    cv.notify_all();
  }
};

namespace {

class FakeNccl final : public NcclCalls {
 public:
  explicit FakeNccl(std::shared_ptr<FakeNcclWorld::State> state) : state_(std::move(state)) {}

  NcclResult get_unique_id(Invitation* id) override {
    const std::lock_guard lock(state_->mutex);
    const std::uint64_t number = ++state_->num_ids;
    std::memcpy(id->data(), &number, sizeof(number));
    return state_->fault("get_unique_id");
  }

  NcclResult init_pair(NcclHandle* comm, const Invitation& id, int index,
                       const NcclOptions&) override {
    EXPECT_GT(open_groups_of_thread, 0) << "communicators are made in a group";
    const std::lock_guard lock(state_->mutex);
    const NcclResult fault = state_->fault("init_pair");
    group_failed = group_failed || fault != NcclResult::kSuccess;
    if (fault != NcclResult::kSuccess) return fault;
    auto& pair = state_->pairs[id];
    if (!pair) pair = std::make_shared<Pair>();
    auto made = std::make_shared<Communicator>(Communicator{pair, index});
    *comm = new CommunicatorPtr(made);
    open_.insert(made);
    ++state_->num_communicators;
    grouped.push_back({made, nullptr, nullptr});
    return NcclResult::kSuccess;
  }

  NcclResult group_start() override {
    const std::lock_guard lock(state_->mutex);
    const NcclResult fault = state_->fault("group_start");
    if (fault != NcclResult::kSuccess) return fault;
    ++open_groups_of_thread;
    group_failed = false;
    ++state_->num_open_groups;
    return NcclResult::kSuccess;
  }

  NcclResult group_end() override {
    EXPECT_GT(open_groups_of_thread, 0) << "a group is closed that nobody opened";
    --open_groups_of_thread;
    const auto issued = std::exchange(grouped, {});
    std::unique_lock lock(state_->mutex);
    --state_->num_open_groups;
    state_->cv.notify_all();
    const NcclResult fault = state_->fault("group_end");
    if (fault != NcclResult::kSuccess) return fault;
    if (group_failed) return NcclResult::kInvalidUsage;
    for (const Issue& issue : issued) {
      (issue.launch ? issue.comm->pair->warm : issue.comm->pair->joined)[issue.comm->side] = true;
    }
    state_->cv.notify_all();
    for (const Issue& issue : issued) {
      const auto& there = issue.launch ? issue.comm->pair->warm : issue.comm->pair->joined;
      const bool* const peer = &there[1 - issue.comm->side];
      if (!state_->wait_for_peer(lock, [peer] { return *peer; })) return NcclResult::kSystemError;
    }
    for (const Issue& issue : issued) {
      if (!issue.launch) continue;
      ++state_->num_messages;
      issue.launch();
      if (state_->queues_are_full) state_->wait_for_room(lock, *issue.comm, *issue.transfer);
    }
    return NcclResult::kSuccess;
  }

  NcclResult send(const void* data, std::size_t num_bytes, int peer, NcclHandle comm,
                  Stream& stream) override {
    return issue("send", const_cast<void*>(data), num_bytes, peer, comm, stream);
  }
  NcclResult receive(void* data, std::size_t num_bytes, int peer, NcclHandle comm,
                     Stream& stream) override {
    return issue("receive", data, num_bytes, peer, comm, stream);
  }

  NcclResult async_error(NcclHandle comm, NcclResult* state) override {
    const CommunicatorPtr own = *static_cast<CommunicatorPtr*>(comm);
    const std::lock_guard lock(state_->mutex);
    const bool lost = state_->broken || own->pair->aborted[1 - own->side];
    *state = lost ? NcclResult::kRemoteError : NcclResult::kSuccess;
    return state_->fault("async_error");
  }

  // Aborting a communicator may wait for everything that runs on the device, so that communicators
  // aborted one by one wait for each other: here, forever.
  NcclResult abort(const std::vector<NcclHandle>& comms) override {
    std::unique_lock lock(state_->mutex);
    for (const NcclHandle comm : comms) {
      const std::unique_ptr<CommunicatorPtr> handle(static_cast<CommunicatorPtr*>(comm));
      (*handle)->pair->aborted[(*handle)->side] = true;
      open_.erase(*handle);
      --state_->num_communicators;
    }
    state_->cv.notify_all();
    state_->cv.wait(lock, [this] {
      return std::none_of(open_.begin(), open_.end(),
                          [](const CommunicatorPtr& comm) { return comm->num_running > 0; });
    });
    return NcclResult::kSuccess;
  }

  std::string describe(NcclResult result) override {
    return result == NcclResult::kRemoteError ? "the peer is gone" : "NCCL says no";
  }

 private:
  NcclResult issue(const char* call, void* data, std::size_t num_bytes, int peer, NcclHandle comm,
                   Stream& stream) {
    EXPECT_GT(open_groups_of_thread, 0) << "a message outside of a group";
    const CommunicatorPtr own = *static_cast<CommunicatorPtr*>(comm);
    EXPECT_EQ(peer, 1 - own->side);
    const std::lock_guard lock(state_->mutex);
    const NcclResult fault = state_->fault(call);
    group_failed = group_failed || fault != NcclResult::kSuccess;
    if (fault != NcclResult::kSuccess) return fault;
    const int sender = std::string(call) == "send" ? own->side : peer;
    auto transfer = std::make_shared<Transfer>(Transfer{data, num_bytes});
    auto& fake = dynamic_cast<FakeStream&>(stream);
    auto launch = [state = state_, own, sender, transfer, &fake] {
      fake.launch([=] { state->run(own, sender, transfer); });
    };
    grouped.push_back({own, transfer, std::move(launch)});
    return NcclResult::kSuccess;
  }

  const std::shared_ptr<FakeNcclWorld::State> state_;
  std::set<CommunicatorPtr> open_;  // of this device
};

}  // namespace

FakeNcclWorld::FakeNcclWorld() : state_(std::make_shared<State>()) {}

// Frees the threads that are stuck, so that none is left behind.
FakeNcclWorld::~FakeNcclWorld() {
  std::unique_lock lock(state_->mutex);
  state_->is_over = true;
  state_->cv.notify_all();
  state_->cv.wait(lock, [this] { return state_->num_stuck == 0; });
}

std::shared_ptr<NcclCalls> FakeNcclWorld::calls() { return std::make_shared<FakeNccl>(state_); }

void FakeNcclWorld::fail(const std::string& call, NcclResult result, int after) {
  const std::lock_guard lock(state_->mutex);
  state_->faults[call] = {after, result};
}

void FakeNcclWorld::break_network() {
  const std::lock_guard lock(state_->mutex);
  state_->broken = true;
}

void FakeNcclWorld::mend_network() {
  const std::lock_guard lock(state_->mutex);
  state_->broken = false;
}

void FakeNcclWorld::fill_queues() {
  const std::lock_guard lock(state_->mutex);
  state_->queues_are_full = true;
}

bool FakeNcclWorld::is_blocked(std::thread::id thread) const {
  const std::lock_guard lock(state_->mutex);
  return state_->blocked.contains(thread);
}

void FakeNcclWorld::wait_until_groups_are_closed() const {
  std::unique_lock lock(state_->mutex);
  state_->cv.wait(lock, [this] { return state_->num_open_groups == 0; });
}

int FakeNcclWorld::num_communicators() const {
  const std::lock_guard lock(state_->mutex);
  return state_->num_communicators;
}

int FakeNcclWorld::num_messages() const {
  const std::lock_guard lock(state_->mutex);
  return state_->num_messages;
}

}  // namespace dualpipe::testing
