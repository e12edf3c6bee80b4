#include "comm/device_ranks.h"

#include "comm/copy_link.h"
#include "comm/framed_transport.h"
#include "comm/harness.h"
#include "comm/nccl_link.h"

namespace dualpipe::testing {
namespace {

std::vector<MessageWay> all_ways(const std::vector<Rank>& peers) {
  std::vector<MessageWay> ways;
  for (const Rank peer : peers) {
    for (const MessageKind kind : {MessageKind::kActivation, MessageKind::kGradient,
                                   MessageKind::kMirrorLow, MessageKind::kMirrorHigh}) {
      for (const bool outgoing : {true, false}) ways.push_back({peer, kind, outgoing});
    }
  }
  return ways;
}

class Synchronized final : public Transport {
 public:
  explicit Synchronized(std::unique_ptr<Transport> inner) : inner_(std::move(inner)) {}

  void connect() override { inner_->connect(); }
  void begin_step(const StepInfo& info) override { inner_->begin_step(info); }
  EventPtr send(Rank to, const MessageId& id, Message message, const EventPtr& ready) override {
    return inner_->send(to, id, std::move(message), ready);
  }
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override {
    return std::make_unique<Receive>(inner_->receive(from, id));
  }
  void end_step() override { inner_->end_step(); }
  void abort(const Failure& failure) noexcept override { inner_->abort(failure); }
  void recover() override { inner_->recover(); }
  std::optional<std::string> fault() override { return inner_->fault(); }
  bool busy() override { return inner_->busy(); }

 private:
  class Receive final : public PendingReceive {
   public:
    explicit Receive(std::unique_ptr<PendingReceive> inner) : inner_(std::move(inner)) {}
    Arrival wait() override {
      Arrival arrival = inner_->wait();
      if (arrival.ready) arrival.ready->synchronize();
      return {std::move(arrival.message), nullptr};
    }

   private:
    const std::unique_ptr<PendingReceive> inner_;
  };

  const std::unique_ptr<Transport> inner_;
};

LinkMaker link_maker(FakeWorld& world, LinkKind kind, const std::shared_ptr<Device>& device,
                     Rank rank) {
  if (kind == LinkKind::kNccl) {
    return [calls = world.nccl.calls(), device, rank] {
      return std::make_unique<NcclLink>(calls, device, rank, NcclOptions{});
    };
  }
  const Queues queues = kind == LinkKind::kCopyInSharedQueues ? Queues::kShared : Queues::kOwn;
  return [calls = world.copies.calls(), device, rank, queues] {
    return copy_link(calls, device, rank, queues);
  };
}

}  // namespace

std::string to_string(LinkKind kind) {
  switch (kind) {
    case LinkKind::kNccl:
      return "Nccl";
    case LinkKind::kCopy:
      return "Copy";
    case LinkKind::kCopyInSharedQueues:
      return "CopyInSharedQueues";
  }
  return "unknown";
}

std::unique_ptr<Transport> device_rank(FakeWorld& world, LinkKind kind, LinkFabric& fabric,
                                       Rank rank, int num_ranks, std::shared_ptr<Device> device,
                                       const DeviceRankOptions& options) {
  std::vector<Rank> peers;
  for (int peer = 0; peer < num_ranks; ++peer) {
    if (peer != rank.value()) peers.emplace_back(peer);
  }
  auto host = framed_transport(fabric.link(rank), {rank, num_ranks, peers, 0});
  LinkMaker make_link = link_maker(world, kind, device, rank);
  return device_transport(std::move(make_link), std::move(device), std::move(host),
                          {.rank = rank,
                           .ways = all_ways(peers),
                           .timeout = options.timeout,
                           .dynamic_shapes = options.dynamic_shapes});
}

std::unique_ptr<Transport> synchronized(std::unique_ptr<Transport> transport) {
  return std::make_unique<Synchronized>(std::move(transport));
}

DeviceRanks::DeviceRanks(LinkKind kind, int num_ranks, const DeviceRankOptions& options) {
  const FakeQueue queue = kind == LinkKind::kCopyInSharedQueues ? fake_queue() : nullptr;
  for (int rank = 0; rank < num_ranks; ++rank) {
    devices.push_back(std::make_shared<FakeDevice>(queue));
    transports.push_back(
        device_rank(world, kind, fabric, Rank(rank), num_ranks, devices.back(), options));
  }
}

void DeviceRanks::connect() {
  run_ranks(static_cast<int>(transports.size()),
            [this](int rank) { transports[static_cast<std::size_t>(rank)]->connect(); });
}

int DeviceRanks::num_allocations() const {
  int num = world.copies.num_blocks();
  for (const auto& device : devices) num += device->num_allocations();
  return num;
}

}  // namespace dualpipe::testing
