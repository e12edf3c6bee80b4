#pragma once

#include <memory>
#include <vector>

#include "comm/copy_link.h"
#include "comm/fake_copies.h"
#include "device/fake_device.h"

namespace dualpipe::testing {

// The ways between ranks 0 and 1, as each of them has them.
constexpr DeviceLink::Index kUp = 0;    // from rank 0 to rank 1
constexpr DeviceLink::Index kDown = 1;  // back
[[nodiscard]] std::vector<DeviceWay> ways_of(Rank rank);

// Two ranks as threads of one process, by links alone.
struct CopyPair {
  // Shared: all streams of the links are in one queue.
  explicit CopyPair(Queues queues = Queues::kOwn);
  void connect();

  // A message of this many bytes each, on the way up; bytes are `fill`.
  EventPtr send(int fill, const std::vector<std::size_t>& sizes, const EventPtr& ready = nullptr);

  struct Received {
    std::vector<Piece> pieces;
    EventPtr end;
    // Waits for it.
    [[nodiscard]] bool is(int fill) const;
  };
  Received receive(const std::vector<std::size_t>& sizes, const EventPtr& free = nullptr);

  FakeCopyWorld world;
  std::vector<std::shared_ptr<FakeDevice>> devices;
  std::vector<std::unique_ptr<std::vector<std::byte>>> sent;  // as long as a stream may read it
  std::vector<std::unique_ptr<DeviceLink>> links;             // last: they use what is above
};

}  // namespace dualpipe::testing
