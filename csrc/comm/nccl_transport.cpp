#include "comm/nccl_transport.h"

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "comm/failure_flag.h"
#include "comm/nccl_layouts.h"
#include "comm/nccl_link.h"
#include "common/error.h"
#include "device/device_pool.h"

namespace dualpipe {
namespace {

using Clock = std::chrono::steady_clock;

// Marks the step in which ranks meet; no program has it.
constexpr std::uint64_t kMeeting = ~std::uint64_t{0};

constexpr std::chrono::milliseconds kPoll{1};
constexpr std::chrono::milliseconds kPatience{100};

// Both ranks of a pair order their ways like this.
auto order_of(Rank rank, const NcclChannel& channel) {
  const bool upwards = channel.outgoing == (rank < channel.peer);
  return std::tuple(channel.peer, upwards, channel.kind);
}

std::string name_of(Rank rank, const NcclChannel& channel) {
  const auto [from, to] =
      channel.outgoing ? std::pair(rank, channel.peer) : std::pair(channel.peer, rank);
  return cat(channel.kind == MessageKind::kActivation ? "activations" : "gradients", " from rank ",
             from, " to rank ", to);
}

std::vector<NcclPiece> pieces_of(const Message& message) {
  std::vector<NcclPiece> pieces;
  for (std::size_t i = 0; i < message.num_tensors(); ++i) {
    const std::uint64_t num_bytes = message.layout[i].num_bytes;
    if (num_bytes > 0) pieces.push_back({message.data[i], num_bytes});
  }
  return pieces;
}

// What a device has been told to do and may not have done.
struct InFlight {
  MessageId id;
  EventPtr end;
  std::shared_ptr<void> owner;  // of what is sent; null: it is received
  Clock::time_point since;
};

// A receive, issued as soon as its layout is known.
struct Incoming {
  MessageId id;
  std::unique_ptr<PendingReceive> description;  // null: the layout is known
  Layout layout;
  bool issued = false;
  Message message;
  EventPtr arrived;
};

class NcclTransport final : public Transport {
 public:
  NcclTransport(std::shared_ptr<NcclCalls> calls, std::shared_ptr<Device> device,
                std::unique_ptr<HostTransport> host, NcclTransportOptions options);
  ~NcclTransport() override;

  void connect() override;
  void begin_step(const StepInfo& info) override;
  void send(Rank to, const MessageId& id, Message message, const EventPtr& ready) override;
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override;
  void end_step() override;
  void abort(const Failure& failure) noexcept override;
  void recover() override;
  [[nodiscard]] bool carries_device_memory() const override { return true; }
  std::optional<std::string> fault() override;
  bool busy() override;

  // Blocks for the layout if it is not known, never for the device.
  [[nodiscard]] Message take(std::size_t way, const std::shared_ptr<Incoming>& incoming);

 private:
  struct Way {
    std::deque<std::shared_ptr<Incoming>> unknown;  // wait for their layouts, in order
    std::deque<InFlight> in_flight;                 // guarded by mutex_
  };

  void meet(std::int64_t step);
  [[nodiscard]] std::vector<NcclUniqueId> exchange_ids();
  [[nodiscard]] NcclUniqueId new_id();
  [[nodiscard]] std::optional<std::size_t> find_way(Rank peer, MessageKind kind,
                                                    bool outgoing) const;
  void issue(std::size_t way, Incoming& incoming);
  void note(std::size_t way, InFlight operation);
  void forget_done(Way& way);
  [[nodiscard]] std::optional<std::string> overdue();
  template <typename Call>
  auto unless_failed(const Call& call);

  const std::shared_ptr<NcclCalls> calls_;
  const std::shared_ptr<Device> device_;
  const std::unique_ptr<HostTransport> host_;
  NcclTransportOptions options_;  // channels: in the order of ways
  DevicePool pool_;
  FailureFlag failure_;

  std::mutex mutex_;                // link_ itself, and what ways have in flight
  std::shared_ptr<NcclLink> link_;  // null: the ranks have to meet
  std::vector<Way> ways_;

  std::map<StepKind, StepLayouts> known_;
  std::optional<StepLayouts> unkept_;  // of a step whose layouts nobody may keep
  StepLayouts* layouts_ = nullptr;     // of the step at work; null: none
};

class DeviceReceive final : public PendingReceive {
 public:
  DeviceReceive(NcclTransport& transport, std::size_t way, std::shared_ptr<Incoming> incoming)
      : transport_(transport), way_(way), incoming_(std::move(incoming)) {}
  Message wait() override { return transport_.take(way_, incoming_); }

 private:
  NcclTransport& transport_;
  const std::size_t way_;
  const std::shared_ptr<Incoming> incoming_;
};

NcclTransport::NcclTransport(std::shared_ptr<NcclCalls> calls, std::shared_ptr<Device> device,
                             std::unique_ptr<HostTransport> host, NcclTransportOptions options)
    : calls_(std::move(calls)),
      device_(std::move(device)),
      host_(std::move(host)),
      options_(std::move(options)),
      pool_(device_),
      ways_(options_.channels.size()) {
  std::sort(options_.channels.begin(), options_.channels.end(),
            [this](const NcclChannel& a, const NcclChannel& b) {
              return order_of(options_.rank, a) < order_of(options_.rank, b);
            });
}

// A step is done when all ranks have issued it: the devices of this one and of its peers may still
// be at it.
NcclTransport::~NcclTransport() {
  try {
    while (busy() && !fault()) std::this_thread::sleep_for(kPoll);
  } catch (const std::exception&) {
    // The device is broken.
  }
  abort({options_.rank, 0, "the transport is gone"});
}

// What fails here by itself ends the communicators; the host's failures come with their own words.
template <typename Call>
auto NcclTransport::unless_failed(const Call& call) {
  failure_.throw_if_set();
  try {
    return call();
  } catch (const PipelineError&) {
    // An abort in the middle of the call says why. A peer that ends its step aborts its
    // communicators, and why it did so comes by way of the host.
    for (auto waited = kPoll; waited < kPatience; waited += kPoll) {
      failure_.throw_if_set();
      host_->throw_if_failed();
      std::this_thread::sleep_for(kPoll);
    }
    throw;
  }
}

void NcclTransport::connect() {
  unless_failed([&] {
    if (link_ == nullptr) meet(0);
  });
}

void NcclTransport::begin_step(const StepInfo& info) {
  unless_failed([&] {
    DUALPIPE_CHECK(layouts_ == nullptr, "begin_step within a step");
    if (link_ == nullptr) meet(info.step);
    host_->begin_step(info);
    if (options_.dynamic_shapes) {
      layouts_ = &unkept_.emplace(ways_.size());
    } else {
      const HostTransport::Extremes all = host_->agree(info.shapes);
      const StepKind kind{info.program_digest, all.smallest, all.largest};
      layouts_ = &known_.try_emplace(kind, ways_.size()).first->second;
    }
    for (WayLayouts& way : layouts_->ways) way.begin();
  });
}

// A step of the host's that only makes the communicators.
void NcclTransport::meet(std::int64_t step) {
  host_->begin_step({step, kMeeting, "the meeting of the ranks' GPUs", 0});
  const std::vector<NcclUniqueId> ids = exchange_ids();
  host_->end_step();
  std::vector<NcclWay> ways;
  for (const NcclChannel& channel : options_.channels) {
    ways.push_back({channel.peer, channel.outgoing, name_of(options_.rank, channel)});
  }
  auto link = std::make_shared<NcclLink>(*calls_, *device_, options_.rank, options_.nccl);
  {
    const std::lock_guard lock(mutex_);
    link_ = link;
  }
  failure_.throw_if_set();  // an abort before it was there
  link->connect(std::move(ways), ids, options_.timeout);
}

// For each pair of ranks the lower one makes the ids of all their ways.
std::vector<NcclUniqueId> NcclTransport::exchange_ids() {
  std::map<Rank, std::vector<NcclUniqueId>> by_peer;
  for (const NcclChannel& channel : options_.channels) by_peer[channel.peer].emplace_back();
  const MessageId greeting{MessageKind::kActivation, Stage(0), Microbatch(0)};
  for (auto& [peer, ids] : by_peer) {
    if (peer < options_.rank) continue;
    std::generate(ids.begin(), ids.end(), [this] { return new_id(); });
    host_->send(peer, greeting, bytes_message(ids.data(), ids.size() * sizeof(NcclUniqueId)),
                nullptr);
  }
  std::vector<NcclUniqueId> all;
  for (auto& [peer, ids] : by_peer) {
    if (peer < options_.rank) {
      const Message theirs = host_->receive(peer, greeting)->wait();
      read_bytes(theirs, ids.data(), ids.size() * sizeof(NcclUniqueId));
    }
    all.insert(all.end(), ids.begin(), ids.end());
  }
  return all;
}

NcclUniqueId NcclTransport::new_id() {
  NcclUniqueId id{};
  const NcclResult result = calls_->get_unique_id(&id);
  if (result == NcclResult::kSuccess) return id;
  throw PipelineError(cat("rank ", options_.rank,
                          ": cannot start a communicator: ", calls_->describe(result, nullptr)));
}

void NcclTransport::send(Rank to, const MessageId& id, Message message, const EventPtr& ready) {
  unless_failed([&] {
    const auto way = find_way(to, id.kind, true);
    if (!way) {
      DUALPIPE_CHECK(!message.on_device, "the ", to_string(id), " has no way from GPU to GPU");
      return host_->send(to, id, std::move(message), ready);
    }
    WayLayouts& layouts = layouts_->ways[*way];
    if (const Layout* known = layouts.next()) {
      DUALPIPE_USER_CHECK(
          *known == message.layout, "rank ", options_.rank, ": the ", to_string(id), " is ",
          to_string(message.layout), "; it was ", to_string(*known),
          " in an earlier step whose inputs had the same shapes. Where shapes depend on more than "
          "those, pass DualPipeConfig(dynamic_shapes=True)");
    } else {
      host_->send(to, id, layout_message(message.layout), nullptr);
      layouts.write_down(message.layout);
    }
    const std::vector<NcclPiece> pieces = pieces_of(message);
    if (pieces.empty()) return;
    EventPtr end = link_->transfer(*way, pieces, ready);
    note(*way, {id, std::move(end), std::move(message.owner), Clock::now()});
  });
}

std::unique_ptr<PendingReceive> NcclTransport::receive(Rank from, const MessageId& id) {
  return unless_failed([&]() -> std::unique_ptr<PendingReceive> {
    const auto way = find_way(from, id.kind, false);
    if (!way) return host_->receive(from, id);
    auto incoming = std::make_shared<Incoming>();
    incoming->id = id;
    if (const Layout* known = layouts_->ways[*way].next()) {
      incoming->layout = *known;
      issue(*way, *incoming);
    } else {
      incoming->description = host_->receive(from, id);
      ways_[*way].unknown.push_back(incoming);
    }
    return std::make_unique<DeviceReceive>(*this, *way, std::move(incoming));
  });
}

Message NcclTransport::take(std::size_t way, const std::shared_ptr<Incoming>& incoming) {
  return unless_failed([&] {
    while (!incoming->issued) {
      // The peer sends in order, so those before come first.
      const std::shared_ptr<Incoming> next = std::move(ways_[way].unknown.front());
      ways_[way].unknown.pop_front();
      next->layout = layout_of(next->description->wait());
      next->description.reset();
      layouts_->ways[way].write_down(next->layout);
      issue(way, *next);
    }
    device_->wait(incoming->arrived);
    return std::move(incoming->message);
  });
}

void NcclTransport::issue(std::size_t way, Incoming& incoming) {
  DevicePool::Lease lease = pool_.acquire(packed_bytes(incoming.layout));
  incoming.message = unpack(incoming.layout, lease.data, lease.owner);
  incoming.message.on_device = true;
  incoming.issued = true;
  const std::vector<NcclPiece> pieces = pieces_of(incoming.message);
  if (pieces.empty()) return;
  incoming.arrived = link_->transfer(way, pieces, lease.free);
  note(way, {incoming.id, incoming.arrived, nullptr, Clock::now()});
}

void NcclTransport::end_step() {
  unless_failed([&] {
    DUALPIPE_CHECK(layouts_ != nullptr, "end_step outside of a step");
    host_->end_step();
    for (WayLayouts& way : layouts_->ways) way.commit();
    layouts_ = nullptr;
    for (Way& way : ways_) forget_done(way);
  });
}

void NcclTransport::abort(const Failure& failure) noexcept {
  if (!failure_.set(FailureFlag::Kind::kPipeline, failure.text)) return;
  host_->abort(failure);
  std::shared_ptr<NcclLink> link;
  {
    const std::lock_guard lock(mutex_);
    link = link_;
  }
  if (link) link->abort();
}

void NcclTransport::recover() {
  abort({options_.rank, 0, "the step failed"});
  host_->recover();
  if (link_) link_->drain();
  std::vector<Way> forgotten(ways_.size());  // let go after the lock, as in forget_done()
  const std::lock_guard lock(mutex_);
  link_.reset();
  ways_.swap(forgotten);
  pool_ = DevicePool(device_);  // what was to be filled is nobody's now
  known_.clear();               // a rank that has committed and one that has not must agree again
  layouts_ = nullptr;
  failure_.clear();
}

std::optional<std::string> NcclTransport::fault() {
  std::shared_ptr<NcclLink> link;
  {
    const std::lock_guard lock(mutex_);
    link = link_;
  }
  if (link == nullptr || failure_.is_set()) return std::nullopt;
  if (auto error = link->error()) return error;
  return overdue();
}

bool NcclTransport::busy() {
  const std::lock_guard lock(mutex_);
  return !failure_.is_set() && std::any_of(ways_.begin(), ways_.end(), [](const Way& way) {
    return !way.in_flight.empty() && !way.in_flight.back().end->done();
  });
}

std::optional<std::string> NcclTransport::overdue() {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < ways_.size(); ++i) {
    for (const InFlight& operation : ways_[i].in_flight) {
      if (operation.end->done()) continue;
      if (Clock::now() - operation.since < options_.timeout) break;
      const NcclChannel& channel = options_.channels[i];
      return cat("rank ", options_.rank, "'s GPU has waited longer than ",
                 static_cast<double>(options_.timeout.count()) / 1000, " s for rank ", channel.peer,
                 channel.outgoing ? " to take the " : " to send the ", to_string(operation.id));
    }
  }
  return std::nullopt;
}

void NcclTransport::note(std::size_t way, InFlight operation) {
  forget_done(ways_[way]);
  const std::lock_guard lock(mutex_);
  ways_[way].in_flight.push_back(std::move(operation));
}

void NcclTransport::forget_done(Way& way) {
  std::deque<InFlight> done;  // let go after the lock: tensors may need the interpreter's
  const std::lock_guard lock(mutex_);
  while (!way.in_flight.empty() && way.in_flight.front().end->done()) {
    done.push_back(std::move(way.in_flight.front()));
    way.in_flight.pop_front();
  }
}

std::optional<std::size_t> NcclTransport::find_way(Rank peer, MessageKind kind,
                                                   bool outgoing) const {
  DUALPIPE_CHECK(layouts_ != nullptr, "a message outside of a step");
  for (std::size_t i = 0; i < options_.channels.size(); ++i) {
    const NcclChannel& channel = options_.channels[i];
    if (channel.peer == peer && channel.kind == kind && channel.outgoing == outgoing) return i;
  }
  return std::nullopt;
}

}  // namespace

std::unique_ptr<Transport> nccl_transport(std::shared_ptr<NcclCalls> calls,
                                          std::shared_ptr<Device> device,
                                          std::unique_ptr<HostTransport> host,
                                          NcclTransportOptions options) {
  return std::make_unique<NcclTransport>(std::move(calls), std::move(device), std::move(host),
                                         std::move(options));
}

}  // namespace dualpipe
