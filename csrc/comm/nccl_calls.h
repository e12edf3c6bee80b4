#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "comm/device_link.h"

namespace dualpipe {

// The few NCCL calls that the transport makes, so that it can be compiled and tested without NCCL:
// csrc/comm/cuda_nccl.h has the real ones, tests/cpp/comm/fake_nccl.h fakes them with threads.
//
// Results are NCCL's own codes.
enum class NcclResult : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

using NcclHandle = void*;  // an ncclComm_t

struct NcclOptions {
  // Thread blocks that a message may take from computation; 0: NCCL's own choice.
  int max_ctas = 1;
};

// All communicators are blocking: connecting, and the first message, wait for the peer; later
// messages are issued at once. Thread-safe for different communicators, async_error() for any; a
// group belongs to the thread that opened it.
class NcclCalls {
 public:
  virtual ~NcclCalls() = default;
  virtual NcclResult get_unique_id(Invitation* id) = 0;
  // Joins a communicator of two as `index`, when the group is closed; *comm may be written until
  // then.
  virtual NcclResult init_pair(NcclHandle* comm, const Invitation& id, int index,
                               const NcclOptions& options) = 0;
  virtual NcclResult group_start() = 0;
  virtual NcclResult group_end() = 0;
  // `peer` is an index in the communicator.
  virtual NcclResult send(const void* data, std::size_t num_bytes, int peer, NcclHandle comm,
                          Stream& stream) = 0;
  virtual NcclResult receive(void* data, std::size_t num_bytes, int peer, NcclHandle comm,
                             Stream& stream) = 0;
  virtual NcclResult async_error(NcclHandle comm, NcclResult* state) = 0;
  // Ends whatever is running on all of them and frees them. NCCL promises nothing for one on which
  // another thread is issuing a message.
  virtual NcclResult abort(const std::vector<NcclHandle>& comms) = 0;
  // "ncclRemoteError: remote process exited or there was a network error", with NCCL's last error.
  virtual std::string describe(NcclResult result) = 0;
};

}  // namespace dualpipe
