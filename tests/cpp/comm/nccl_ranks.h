#pragma once

#include <memory>
#include <vector>

#include "comm/fake_nccl.h"
#include "comm/memory_link.h"
#include "comm/nccl_transport.h"
#include "device/fake_device.h"

namespace dualpipe::testing {

// Ranks as threads, each with a device of its own, over the fake NCCL; messages that are no
// activations and no gradients go by way of the host.
struct NcclRanks {
  explicit NcclRanks(int num_ranks, bool dynamic_shapes = false,
                     std::chrono::milliseconds timeout = std::chrono::seconds(20));

  // Makes the communicators of all ranks.
  void connect();

  FakeNcclWorld world;
  LinkFabric fabric;
  std::vector<std::shared_ptr<FakeDevice>> devices;
  std::vector<std::unique_ptr<Transport>> transports;  // last: they use what is above
};

}  // namespace dualpipe::testing
