#include "comm/copy_pair.h"

#include <algorithm>
#include <chrono>

#include "comm/harness.h"

namespace dualpipe::testing {

std::vector<DeviceWay> ways_of(Rank rank) {
  const Rank peer(1 - rank.value());
  const bool is_lower = rank < peer;
  return {{peer, is_lower, "activations from rank 0 to rank 1"},
          {peer, !is_lower, "gradients from rank 1 to rank 0"}};
}

CopyPair::CopyPair(Queues queues) {
  const FakeQueue queue = queues == Queues::kShared ? fake_queue() : nullptr;
  for (int rank = 0; rank < 2; ++rank) {
    devices.push_back(std::make_shared<FakeDevice>(queue));
    links.push_back(copy_link(world.calls(), devices.back(), Rank(rank), queues));
  }
}

void CopyPair::connect() {
  const std::vector<Invitation> invitations = {links[0]->invite(), links[0]->invite()};
  run_ranks(2, [&](int rank) {
    links[static_cast<std::size_t>(rank)]->connect(ways_of(Rank(rank)), invitations,
                                                   std::chrono::seconds(20));
  });
}

EventPtr CopyPair::send(int fill, const std::vector<std::size_t>& sizes, const EventPtr& ready) {
  std::vector<Piece> pieces;
  for (const std::size_t size : sizes) {
    sent.push_back(std::make_unique<std::vector<std::byte>>(size, static_cast<std::byte>(fill)));
    pieces.push_back({sent.back()->data(), size});
  }
  return links[0]->transfer(kUp, pieces, ready);
}

CopyPair::Received CopyPair::receive(const std::vector<std::size_t>& sizes, const EventPtr& free) {
  std::vector<Piece> pieces;
  for (const std::size_t size : sizes) {
    pieces.push_back({static_cast<std::byte*>(links[1]->allocator()->allocate(size)), size});
  }
  EventPtr end = links[1]->transfer(kUp, pieces, free);
  return {std::move(pieces), std::move(end)};
}

bool CopyPair::Received::is(int fill) const {
  end->synchronize();
  return std::all_of(pieces.begin(), pieces.end(), [fill](const Piece& piece) {
    return std::all_of(piece.data, piece.data + piece.num_bytes,
                       [fill](std::byte byte) { return byte == static_cast<std::byte>(fill); });
  });
}

}  // namespace dualpipe::testing
