#pragma once

#include <memory>
#include <vector>

#include "comm/fake_nccl.h"
#include "comm/memory_link.h"
#include "comm/nccl_transport.h"
#include "device/fake_device.h"

namespace dualpipe::testing {

struct NcclRankOptions {
  bool dynamic_shapes = false;
  std::chrono::milliseconds timeout = std::chrono::seconds(20);
};

// One rank, a thread, over the fake NCCL; messages that are no activations and no gradients go by
// way of the host.
[[nodiscard]] std::unique_ptr<Transport> nccl_rank(FakeNcclWorld& world, LinkFabric& fabric,
                                                   Rank rank, int num_ranks,
                                                   std::shared_ptr<Device> device,
                                                   const NcclRankOptions& options = {});

// A transport whose device is through whenever a wait returns, for callers that look at bytes.
[[nodiscard]] std::unique_ptr<Transport> synchronized(std::unique_ptr<Transport> transport,
                                                      std::shared_ptr<Device> device);

// Ranks as threads, each with a device of its own.
struct NcclRanks {
  explicit NcclRanks(int num_ranks, const NcclRankOptions& options = {});

  // Makes the communicators of all ranks.
  void connect();

  FakeNcclWorld world;
  LinkFabric fabric;
  std::vector<std::shared_ptr<FakeDevice>> devices;
  std::vector<std::unique_ptr<Transport>> transports;  // last: they use what is above
};

}  // namespace dualpipe::testing
