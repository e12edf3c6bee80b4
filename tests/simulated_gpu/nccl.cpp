// NCCL between threads of one process or of several: communicators of two, and what dualpipe_ext
// calls of it. A message is a transfer within the work of both streams, complete when both are
// there.
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "nccl_comm.h"
#include "streams.h"

namespace {

using simulated::Channel;

struct Transfer {
  bool is_send;
  void* data;
  std::size_t num_bytes;
};

struct Message {
  ncclComm* comm;
  cudaStream_t stream;
  Transfer transfer;
};
struct Group {
  int depth = 0;
  std::vector<ncclComm*> inits;
  std::vector<Message> messages;
  std::vector<ncclComm*> aborts;
};
thread_local Group group;

// Both block until the other ends do the same, as NCCL does; their order does not matter.
void connect(const std::vector<ncclComm*>& comms) {
  for (ncclComm* const comm : comms) comm->channel->listen();
  for (ncclComm* const comm : comms) comm->channel->connect();
}

void meet(const std::vector<std::shared_ptr<Channel>>& channels) {
  std::vector<std::thread> threads;
  for (const auto& channel : channels) threads.emplace_back([channel] { (void)channel->meet(); });
  for (std::thread& thread : threads) thread.join();
}

// All of a group's messages of one communicator go at once.
void transfer(Channel& channel, const std::vector<Transfer>& transfers) {
  std::thread sends([&] {
    for (const Transfer& one : transfers) {
      if (one.is_send && !channel.send(one.data, one.num_bytes)) return;
    }
  });
  for (const Transfer& one : transfers) {
    if (!one.is_send && !channel.receive(one.data, one.num_bytes)) break;
  }
  sends.join();
}

void issue(const std::vector<Message>& messages) {
  std::map<std::pair<ncclComm*, cudaStream_t>, std::vector<Transfer>> kernels;
  for (const Message& message : messages) {
    kernels[{message.comm, message.stream}].push_back(message.transfer);
  }
  std::vector<std::shared_ptr<Channel>> channels;
  for (const Message& message : messages) {
    if (!std::exchange(message.comm->is_connected, true)) channels.push_back(message.comm->channel);
  }
  meet(channels);
  for (auto& [where, transfers] : kernels) {
    const auto& [comm, stream] = where;
    simulated::stream_of(stream).put([channel = comm->channel, transfers = std::move(transfers)] {
      transfer(*channel, transfers);
    });
  }
}

// The kernels end first; then memory is freed, which waits for the whole device.
void end(const std::vector<ncclComm*>& comms) {
  for (ncclComm* const comm : comms) comm->channel->end();
  if (comms.empty()) return;
  simulated::after_all([comms] {
    for (ncclComm* const comm : comms) delete comm;
  });
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
  const std::string name =
      "simulated NCCL " + std::to_string(getpid()) + " " + std::to_string(++next);
  std::memcpy(id->internal, name.data(), name.size());
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
  *comm = new ncclComm{std::make_shared<Channel>(id.internal, index), index};
  return in_group([&] { group.inits.push_back(*comm); });
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int num_ranks, ncclUniqueId id, int index) {
  return ncclCommInitRankConfig(comm, num_ranks, id, index, nullptr);
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
  *error = comm->channel->fails() ? ncclInvalidUsage : ncclSuccess;
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  return in_group([&] { group.aborts.push_back(comm); });
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) { return ncclCommAbort(comm); }
ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
