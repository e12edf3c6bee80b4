#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "comm/device_link.h"
#include "comm/transport.h"

namespace dualpipe {

struct DeviceTransportOptions {
  Rank rank;
  // All by which this rank sends and receives device memory. If rank a has a way to rank b, b has
  // the same from a. Other messages travel in host memory.
  std::vector<MessageWay> ways;
  // How long the device may wait for one message.
  std::chrono::milliseconds timeout{600'000};
  // Shapes may differ from step to step with equal inputs: each message is described to its
  // receiver. Otherwise they are in the first step of a kind and then known.
  bool dynamic_shapes = false;
};

// Messages in device memory over a link, beside a transport of host memory that carries everything
// else: greetings, the layouts of messages, the end of a step.
//
// A way has a stream of its own, so that nothing waits for what it does not need and order within a
// way, which the verifier proves, is all that the link asks for. A send starts after its event; its
// tensors are kept until it has left. A receive goes into pooled memory that is filled when the
// readers before are through: the compute stream, a reduction stream for mirrors. The host waits
// for a peer in begin_step alone (for the link in the first one and after a failure, and to agree
// on the shapes), and for layouts that it does not know: those of first steps, and always those of
// mirrors, where gradients may come and go.
//
// begin_step blocks. end_step returns when all ranks have issued everything: devices may still
// work.
[[nodiscard]] std::unique_ptr<Transport> device_transport(LinkMaker make_link,
                                                          std::shared_ptr<Device> device,
                                                          std::unique_ptr<HostTransport> host,
                                                          DeviceTransportOptions options);

}  // namespace dualpipe
