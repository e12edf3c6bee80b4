#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "comm/nccl_calls.h"
#include "comm/transport.h"

namespace dualpipe {

// One way for one kind of message between this rank and another one.
struct NcclChannel {
  Rank peer;
  MessageKind kind;
  bool outgoing;
};

struct NcclTransportOptions {
  Rank rank;
  // All that this rank sends and receives in device memory. If rank a has a channel to rank b, b
  // has the same from a. Messages of other kinds (mirrors) travel in host memory.
  std::vector<NcclChannel> channels;
  NcclOptions nccl;
  // How long the device may wait for one message.
  std::chrono::milliseconds timeout{600'000};
  // Shapes may differ from step to step with equal inputs: each message is described to its
  // receiver. Otherwise they are in the first step of a kind and then known.
  bool dynamic_shapes = false;
};

// Messages in device memory over NCCL, beside a transport of host memory that carries everything
// else: greetings, the layouts of messages, the end of a step.
//
// A channel has a communicator and a stream of its own, so that nothing waits for what it does not
// need and order within a channel, which the verifier proves, is all that NCCL asks for. A send
// starts after its event; its tensors are kept until it has left. A receive goes into pooled memory
// that is filled when the readers before are through; only the compute stream waits for it. The
// host waits for a peer in begin_step alone (for the communicators in the first one and after a
// failure, and to agree on the shapes), and for layouts that it does not know yet.
//
// begin_step blocks. end_step returns when all ranks have issued everything: devices may still
// work.
[[nodiscard]] std::unique_ptr<Transport> nccl_transport(std::shared_ptr<NcclCalls> calls,
                                                        std::shared_ptr<Device> device,
                                                        std::unique_ptr<HostTransport> host,
                                                        NcclTransportOptions options);

}  // namespace dualpipe
