#include "comm/fake_nccl.h"

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
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
  bool aborted[2] = {false, false};
  std::deque<std::shared_ptr<Transfer>> sends[2];     // by the side that sends
  std::deque<std::shared_ptr<Transfer>> receives[2];  // by the side that sends
};

struct Communicator {
  std::shared_ptr<Pair> pair;
  int side;
  bool busy = false;  // with a group that is closed and not issued yet
};
using CommunicatorPtr = std::shared_ptr<Communicator>;

struct Issue {
  CommunicatorPtr comm;
  std::function<void()> launch;
};

thread_local int open_groups_of_thread = 0;
thread_local bool group_failed = false;  // one call of it did: nothing of it happens
thread_local std::vector<Issue> grouped;

}  // namespace

struct FakeNcclWorld::State {
  std::mutex mutex;
  std::condition_variable cv;
  std::map<NcclUniqueId, std::shared_ptr<Pair>> pairs;
  std::map<std::string, std::pair<int, NcclResult>> faults;  // how many calls are left before it
  std::uint64_t num_ids = 0;
  int num_open_groups = 0;
  int num_communicators = 0;
  int num_messages = 0;
  bool broken = false;
  HostStream helpers{"fake_nccl"};  // last: what it runs uses what is above

  // Holds the lock. The fault that this call meets, or success.
  NcclResult fault(const std::string& call) {
    const auto found = faults.find(call);
    if (found == faults.end() || found->second.first-- > 0) return NcclResult::kSuccess;
    const NcclResult result = found->second.second;
    faults.erase(found);
    return result;
  }

  // Runs on a stream: waits for the other side, as a kernel of NCCL does, or for the end.
  void run(const std::shared_ptr<Pair>& pair, int own_side, int sender,
           const std::shared_ptr<Transfer>& transfer) {
    std::unique_lock lock(mutex);
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
    // What was aborted takes part in nothing any more: its memory may be gone.
    if (!transfer->done) std::erase(own_side == sender ? sends : receives, transfer);
  }
};

namespace {

class FakeNccl final : public NcclCalls {
 public:
  explicit FakeNccl(std::shared_ptr<FakeNcclWorld::State> state) : state_(std::move(state)) {}

  NcclResult get_unique_id(NcclUniqueId* id) override {
    const std::lock_guard lock(state_->mutex);
    const std::uint64_t number = ++state_->num_ids;
    std::memcpy(id->data(), &number, sizeof(number));
    return state_->fault("get_unique_id");
  }

  NcclResult init_pair(NcclHandle* comm, const NcclUniqueId& id, int index,
                       const NcclOptions&) override {
    const std::lock_guard lock(state_->mutex);
    const NcclResult fault = state_->fault("init_pair");
    if (fault != NcclResult::kSuccess) return fault;
    auto& pair = state_->pairs[id];
    if (!pair) pair = std::make_shared<Pair>();
    EXPECT_FALSE(pair->joined[index]) << "two ranks are the same side of a communicator";
    pair->joined[index] = true;
    *comm = new CommunicatorPtr(std::make_shared<Communicator>(Communicator{pair, index}));
    ++state_->num_communicators;
    return NcclResult::kInProgress;
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

  // As NCCL does for communicators that do not block: a thread issues the group a little later.
  NcclResult group_end() override {
    EXPECT_GT(open_groups_of_thread, 0) << "a group is closed that nobody opened";
    --open_groups_of_thread;
    auto issued = std::exchange(grouped, {});
    const std::lock_guard lock(state_->mutex);
    --state_->num_open_groups;
    const NcclResult fault = state_->fault("group_end");
    if (fault != NcclResult::kSuccess) return fault;
    if (group_failed) return NcclResult::kInvalidUsage;
    if (issued.empty()) return NcclResult::kSuccess;
    state_->num_messages += static_cast<int>(issued.size());
    for (const Issue& issue : issued) issue.comm->busy = true;
    state_->helpers.enqueue([state = state_.get(), issued = std::move(issued)] {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      const std::lock_guard inner(state->mutex);
      for (const Issue& issue : issued) {
        if (!issue.comm->pair->aborted[issue.comm->side]) issue.launch();
        issue.comm->busy = false;
      }
      state->cv.notify_all();
    });
    return NcclResult::kInProgress;
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
    const bool up = own->pair->joined[0] && own->pair->joined[1] && !own->busy;
    const bool lost = state_->broken || own->pair->aborted[1 - own->side];
    *state = lost ? NcclResult::kRemoteError : up ? NcclResult::kSuccess : NcclResult::kInProgress;
    return state_->fault("async_error");
  }

  NcclResult abort(NcclHandle comm) override {
    const std::unique_ptr<CommunicatorPtr> handle(static_cast<CommunicatorPtr*>(comm));
    const CommunicatorPtr own = *handle;
    {
      std::unique_lock lock(state_->mutex);
      own->pair->aborted[own->side] = true;
      state_->cv.notify_all();
      state_->cv.wait(lock, [&] { return !own->busy; });
      --state_->num_communicators;
    }
    state_->cv.notify_all();
    return NcclResult::kSuccess;
  }

  std::string describe(NcclResult result, NcclHandle) override {
    return result == NcclResult::kRemoteError ? "the peer is gone" : "NCCL says no";
  }

 private:
  NcclResult issue(const char* call, void* data, std::size_t num_bytes, int peer, NcclHandle comm,
                   Stream& stream) {
    EXPECT_GT(open_groups_of_thread, 0) << "a message outside of a group";
    const CommunicatorPtr own = *static_cast<CommunicatorPtr*>(comm);
    EXPECT_EQ(peer, 1 - own->side);
    const std::lock_guard lock(state_->mutex);
    EXPECT_FALSE(own->busy) << "a call before the one before has ended";
    const NcclResult fault = state_->fault(call);
    group_failed = group_failed || fault != NcclResult::kSuccess;
    if (fault != NcclResult::kSuccess) return fault;
    const int sender = std::string(call) == "send" ? own->side : peer;
    auto transfer = std::make_shared<Transfer>(Transfer{data, num_bytes});
    auto& fake = dynamic_cast<FakeStream&>(stream);
    auto launch = [state = state_, pair = own->pair, side = own->side, sender, transfer, &fake] {
      fake.launch([=] { state->run(pair, side, sender, transfer); });
    };
    grouped.push_back({own, std::move(launch)});
    return NcclResult::kSuccess;
  }

  const std::shared_ptr<FakeNcclWorld::State> state_;
};

}  // namespace

FakeNcclWorld::FakeNcclWorld() : state_(std::make_shared<State>()) {}
FakeNcclWorld::~FakeNcclWorld() = default;

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

int FakeNcclWorld::num_open_groups() const {
  const std::lock_guard lock(state_->mutex);
  return state_->num_open_groups;
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
