#include "comm/nccl_ranks.h"

#include "comm/framed_transport.h"
#include "comm/harness.h"

namespace dualpipe::testing {
namespace {

std::vector<Rank> others(int num_ranks, int rank) {
  std::vector<Rank> peers;
  for (int peer = 0; peer < num_ranks; ++peer) {
    if (peer != rank) peers.emplace_back(peer);
  }
  return peers;
}

std::vector<NcclChannel> all_channels(const std::vector<Rank>& peers) {
  std::vector<NcclChannel> channels;
  for (const Rank peer : peers) {
    for (const MessageKind kind : {MessageKind::kActivation, MessageKind::kGradient}) {
      for (const bool outgoing : {true, false}) channels.push_back({peer, kind, outgoing});
    }
  }
  return channels;
}

}  // namespace

NcclRanks::NcclRanks(int num_ranks, bool dynamic_shapes, std::chrono::milliseconds timeout) {
  for (int rank = 0; rank < num_ranks; ++rank) {
    const std::vector<Rank> peers = others(num_ranks, rank);
    devices.push_back(std::make_shared<FakeDevice>());
    auto host = framed_transport(fabric.link(Rank(rank)), {Rank(rank), num_ranks, peers, 0});
    transports.push_back(nccl_transport(world.calls(), devices.back(), std::move(host),
                                        {.rank = Rank(rank),
                                         .channels = all_channels(peers),
                                         .nccl = {},
                                         .timeout = timeout,
                                         .dynamic_shapes = dynamic_shapes}));
  }
}

void NcclRanks::connect() {
  run_ranks(static_cast<int>(transports.size()),
            [this](int rank) { transports[static_cast<std::size_t>(rank)]->connect(); });
}

}  // namespace dualpipe::testing
