// NCCL between threads of one process: communicators of two, and what dualpipe_ext calls of it. A
// message is a transfer within the work of both streams, complete when both are there.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "streams.h"

namespace {

struct Outgoing {
  const void* data;
  std::size_t num_bytes;
  bool done = false;
};

// What the two ends of a communicator share.
struct Pair {
  std::mutex mutex;
  std::condition_variable changed;
  int num_ends = 0;       // that called init
  int num_connected = 0;  // that issued a first group
  bool aborted = false;
  std::deque<std::shared_ptr<Outgoing>> from[2];
  ncclResult_t error = ncclSuccess;

  template <class Condition>
  bool wait_for(std::unique_lock<std::mutex>& lock, Condition condition) {
    changed.wait(lock, [&] { return aborted || condition(); });
    return !aborted;
  }
};

struct Transfer {
  bool is_send;
  void* data;
  std::size_t num_bytes;
};

}  // namespace

struct ncclComm {
  std::shared_ptr<Pair> pair;
  int index = 0;
  bool is_connected = false;
};

namespace {

struct Init {
  ncclComm* comm;
  std::string id;
};
struct Message {
  ncclComm* comm;
  cudaStream_t stream;
  Transfer transfer;
};
struct Group {
  int depth = 0;
  std::vector<Init> inits;
  std::vector<Message> messages;
  std::vector<ncclComm*> aborts;
};
thread_local Group group;

std::shared_ptr<Pair> pair_of(const std::string& id) {
  static std::mutex mutex;
  static auto* const pairs = new std::map<std::string, std::shared_ptr<Pair>>;
  const std::lock_guard lock(mutex);
  auto& pair = (*pairs)[id];
  if (pair == nullptr) pair = std::make_shared<Pair>();
  return pair;
}

// Blocks until the other ends do the same, as NCCL does; their order does not matter.
void meet(const std::vector<std::shared_ptr<Pair>>& pairs, int Pair::*count) {
  for (const auto& pair : pairs) {
    const std::lock_guard lock(pair->mutex);
    ++((*pair).*count);
    pair->changed.notify_all();
  }
  for (const auto& pair : pairs) {
    std::unique_lock lock(pair->mutex);
    pair->wait_for(lock, [&] { return (*pair).*count == 2; });
  }
}

void connect(const std::vector<Init>& inits) {
  std::vector<std::shared_ptr<Pair>> pairs;
  for (const Init& init : inits) {
    init.comm->pair = pair_of(init.id);
    pairs.push_back(init.comm->pair);
  }
  meet(pairs, &Pair::num_ends);
}

void receive(Pair& pair, int source, const Transfer& into) {
  std::unique_lock lock(pair.mutex);
  auto& sent = pair.from[source];
  if (!pair.wait_for(lock, [&] { return !sent.empty(); })) return;
  const std::shared_ptr<Outgoing> next = sent.front();
  sent.pop_front();
  if (next->num_bytes != into.num_bytes) {
    pair.error = ncclInvalidUsage;
  } else {
    std::memcpy(into.data, next->data, into.num_bytes);
  }
  next->done = true;
  pair.changed.notify_all();
}

// All of a group's messages of one communicator go at once.
void transfer(Pair& pair, int own, const std::vector<Transfer>& transfers) {
  std::vector<std::shared_ptr<Outgoing>> sent;
  for (const Transfer& one : transfers) {
    if (!one.is_send) continue;
    sent.push_back(std::make_shared<Outgoing>(Outgoing{one.data, one.num_bytes}));
    const std::lock_guard lock(pair.mutex);
    pair.from[own].push_back(sent.back());
  }
  pair.changed.notify_all();
  for (const Transfer& one : transfers) {
    if (!one.is_send) receive(pair, 1 - own, one);
  }
  std::unique_lock lock(pair.mutex);
  for (const auto& one : sent) {
    if (!pair.wait_for(lock, [&] { return one->done; })) return;
  }
}

void issue(const std::vector<Message>& messages) {
  std::map<std::pair<ncclComm*, cudaStream_t>, std::vector<Transfer>> kernels;
  for (const Message& message : messages) {
    kernels[{message.comm, message.stream}].push_back(message.transfer);
  }
  std::vector<std::shared_ptr<Pair>> pairs;
  for (const Message& message : messages) {
    if (!std::exchange(message.comm->is_connected, true)) pairs.push_back(message.comm->pair);
  }
  meet(pairs, &Pair::num_connected);
  for (auto& [where, transfers] : kernels) {
    const auto& [comm, stream] = where;
    simulated::stream_of(stream).put(
        [pair = comm->pair, own = comm->index, transfers = std::move(transfers)] {
          transfer(*pair, own, transfers);
        });
  }
}

// The kernels end first; then memory is freed, which waits for the whole device.
void end(const std::vector<ncclComm*>& comms) {
  for (ncclComm* const comm : comms) {
    if (comm->pair == nullptr) continue;
    const std::lock_guard lock(comm->pair->mutex);
    comm->pair->aborted = true;
    comm->pair->changed.notify_all();
  }
  if (!comms.empty()) simulated::finish_all();
  for (ncclComm* const comm : comms) delete comm;
}

ncclResult_t close_group() {
  const Group closed = std::exchange(group, {});
  connect(closed.inits);
  issue(closed.messages);
  end(closed.aborts);
  return ncclSuccess;
}

template <class Call>
ncclResult_t in_group(Call call) {
  (void)ncclGroupStart();
  call();
  return ncclGroupEnd();
}

}  // namespace

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int> next = 0;
  *id = {};
  const int number = ++next;
  std::memcpy(id->internal, &number, sizeof(number));
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t) { return "an error of the simulated NCCL"; }
const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGroupStart() {
  ++group.depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (group.depth == 0) return ncclInvalidUsage;
  return --group.depth == 0 ? close_group() : ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int num_ranks, ncclUniqueId id, int index,
                                    ncclConfig_t*) {
  if (num_ranks != 2) return ncclInvalidArgument;
  *comm = new ncclComm{nullptr, index};
  const std::string name(id.internal, sizeof(id.internal));
  return in_group([&] { group.inits.push_back({*comm, name}); });
}
ncclResult_t ncclSend(const void* data, std::size_t count, ncclDataType_t, int, ncclComm_t comm,
                      cudaStream_t stream) {
  const Transfer one{true, const_cast<void*>(data), count};
  return in_group([&] { group.messages.push_back({comm, stream, one}); });
}
ncclResult_t ncclRecv(void* data, std::size_t count, ncclDataType_t, int, ncclComm_t comm,
                      cudaStream_t stream) {
  const Transfer one{false, data, count};
  return in_group([&] { group.messages.push_back({comm, stream, one}); });
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  const std::lock_guard lock(comm->pair->mutex);
  *error = comm->pair->error;
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  return in_group([&] { group.aborts.push_back(comm); });
}
