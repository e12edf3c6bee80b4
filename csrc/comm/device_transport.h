#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "comm/device_link.h"
#include "comm/transport.h"

namespace dualpipe {

struct DeviceTransportOptions {
  Rank rank;
  // All ways by which this rank sends and receives device memory. If rank a has a way to rank b, b
  // has the matching one from a. Messages without a way travel in host memory.
  std::vector<MessageWay> ways;
  // How long the device may wait for one message.
  std::chrono::milliseconds timeout{600'000};
  // Shapes may differ between steps whose inputs have equal shapes, so each message is described to
  // its receiver. Otherwise only the messages of a kind's first step are.
  bool dynamic_shapes = false;
};

// Messages in device memory over a link, beside a transport of host memory that carries everything
// else: greetings, the layouts of messages, the end of a step.
//
// Each way has its own stream, so that nothing waits for what it does not need; the link then needs
// only the order within a way, which the verifier proves. A send starts after its event; its
// tensors are kept until it has left. A receive goes into pooled memory, which is filled when
// earlier reads of it have finished: those of the compute stream, or of a reduction stream for
// mirrors. The host waits for peers only in begin_step (to connect the link in the first step and
// after a failure, and to agree on the shapes) and for layouts that it does not know: those of a
// kind's first step, and always those of mirrors, where gradients may come and go.
//
// begin_step blocks. end_step returns when all ranks have issued everything; devices may still be
// working.
[[nodiscard]] std::unique_ptr<Transport> device_transport(LinkMaker make_link,
                                                          std::shared_ptr<Device> device,
                                                          std::unique_ptr<HostTransport> host,
                                                          DeviceTransportOptions options);

}  // namespace dualpipe
