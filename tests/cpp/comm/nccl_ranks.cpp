#include "comm/nccl_ranks.h"

#include "comm/framed_transport.h"
#include "comm/harness.h"

namespace dualpipe::testing {
namespace {

std::vector<NcclChannel> all_channels(const std::vector<Rank>& peers) {
  std::vector<NcclChannel> channels;
  for (const Rank peer : peers) {
    for (const MessageKind kind : {MessageKind::kActivation, MessageKind::kGradient}) {
      for (const bool outgoing : {true, false}) channels.push_back({peer, kind, outgoing});
    }
  }
  return channels;
}

class Synchronized final : public Transport {
 public:
  Synchronized(std::unique_ptr<Transport> inner, std::shared_ptr<Device> device)
      : inner_(std::move(inner)), device_(std::move(device)) {}

  void connect() override { inner_->connect(); }
  void begin_step(const StepInfo& info) override { inner_->begin_step(info); }
  void send(Rank to, const MessageId& id, Message message, const EventPtr& ready) override {
    inner_->send(to, id, std::move(message), ready);
  }
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override {
    return std::make_unique<Receive>(inner_->receive(from, id), *device_);
  }
  void end_step() override { inner_->end_step(); }
  void abort(const Failure& failure) noexcept override { inner_->abort(failure); }
  void recover() override { inner_->recover(); }
  std::optional<std::string> fault() override { return inner_->fault(); }
  bool busy() override { return inner_->busy(); }

 private:
  class Receive final : public PendingReceive {
   public:
    Receive(std::unique_ptr<PendingReceive> inner, Device& device)
        : inner_(std::move(inner)), device_(device) {}
    Message wait() override {
      Message message = inner_->wait();
      device_.record()->synchronize();
      return message;
    }

   private:
    const std::unique_ptr<PendingReceive> inner_;
    Device& device_;
  };

  const std::unique_ptr<Transport> inner_;
  const std::shared_ptr<Device> device_;
};

}  // namespace

std::unique_ptr<Transport> nccl_rank(FakeNcclWorld& world, LinkFabric& fabric, Rank rank,
                                     int num_ranks, std::shared_ptr<Device> device,
                                     const NcclRankOptions& options) {
  std::vector<Rank> peers;
  for (int peer = 0; peer < num_ranks; ++peer) {
    if (peer != rank.value()) peers.emplace_back(peer);
  }
  auto host = framed_transport(fabric.link(rank), {rank, num_ranks, peers, 0});
  return nccl_transport(world.calls(), std::move(device), std::move(host),
                        {.rank = rank,
                         .channels = all_channels(peers),
                         .nccl = {},
                         .timeout = options.timeout,
                         .dynamic_shapes = options.dynamic_shapes});
}

std::unique_ptr<Transport> synchronized(std::unique_ptr<Transport> transport,
                                        std::shared_ptr<Device> device) {
  return std::make_unique<Synchronized>(std::move(transport), std::move(device));
}

NcclRanks::NcclRanks(int num_ranks, const NcclRankOptions& options) {
  for (int rank = 0; rank < num_ranks; ++rank) {
    devices.push_back(std::make_shared<FakeDevice>());
    transports.push_back(nccl_rank(world, fabric, Rank(rank), num_ranks, devices.back(), options));
  }
}

void NcclRanks::connect() {
  run_ranks(static_cast<int>(transports.size()),
            [this](int rank) { transports[static_cast<std::size_t>(rank)]->connect(); });
}

}  // namespace dualpipe::testing
