#pragma once

#include <memory>
#include <vector>

#include "comm/copy_link.h"
#include "comm/fake_copies.h"
#include "device/fake_device.h"

namespace dualpipe::testing {

// The ways between ranks 0 and 1, as each of them sees them.
constexpr DeviceLink::Index kUp = 0;    // from rank 0 to rank 1
constexpr DeviceLink::Index kDown = 1;  // back
[[nodiscard]] std::vector<DeviceWay> ways_of(Rank rank);

// Two ranks as threads of one process, connected by links only.
struct CopyPair {
  // Shared: all streams of the links use one queue.
  explicit CopyPair(Queues queues = Queues::kOwn);
  void connect();

  // Sends a message from rank 0 to rank 1 with one piece of each size; all bytes are `fill`.
  EventPtr send(int fill, const std::vector<std::size_t>& sizes, const EventPtr& ready = nullptr);

  struct Received {
    std::vector<Piece> pieces;
    EventPtr end;
    // Waits for the message; returns whether all its bytes are `fill`.
    [[nodiscard]] bool is(int fill) const;
  };
  Received receive(const std::vector<std::size_t>& sizes, const EventPtr& free = nullptr);

  FakeCopyWorld world;
  std::vector<std::shared_ptr<FakeDevice>> devices;
  std::vector<std::unique_ptr<std::vector<std::byte>>> sent;  // kept while a stream may read it
  std::vector<std::unique_ptr<DeviceLink>> links;             // last: they use the members above
};

}  // namespace dualpipe::testing
