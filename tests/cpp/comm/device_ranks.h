#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/device_transport.h"
#include "comm/fake_copies.h"
#include "comm/fake_nccl.h"
#include "comm/memory_link.h"
#include "device/fake_device.h"

namespace dualpipe::testing {

// kCopyInSharedQueues: the message streams of all ranks share one queue.
enum class LinkKind : std::uint8_t { kNccl, kCopy, kCopyInSharedQueues };
[[nodiscard]] std::string to_string(LinkKind kind);

// What connects the links of ranks that are threads.
struct FakeWorld {
  FakeNcclWorld nccl;
  FakeCopyWorld copies;
};

struct DeviceRankOptions {
  bool dynamic_shapes = false;
  std::chrono::milliseconds timeout = std::chrono::seconds(20);
};

// The transport of one rank, a thread, over such a link, with ways of all kinds to all others.
[[nodiscard]] std::unique_ptr<Transport> device_rank(FakeWorld& world, LinkKind kind,
                                                     LinkFabric& fabric, Rank rank, int num_ranks,
                                                     std::shared_ptr<Device> device,
                                                     const DeviceRankOptions& options = {});

// A transport whose device has finished whenever a wait returns, for callers that look at bytes.
[[nodiscard]] std::unique_ptr<Transport> synchronized(std::unique_ptr<Transport> transport);

// Ranks as threads, each with a device of its own.
struct DeviceRanks {
  DeviceRanks(LinkKind kind, int num_ranks, const DeviceRankOptions& options = {});

  // Connects the links of all ranks.
  void connect();
  // The number of pieces of device memory that all links have allocated.
  [[nodiscard]] int num_allocations() const;

  FakeWorld world;
  LinkFabric fabric;
  std::vector<std::shared_ptr<FakeDevice>> devices;
  std::vector<std::unique_ptr<Transport>> transports;  // last: they use the members above
};

}  // namespace dualpipe::testing
