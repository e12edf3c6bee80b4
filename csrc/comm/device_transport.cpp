#include "comm/device_transport.h"

#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "comm/device_ways.h"
#include "comm/failure_flag.h"
#include "comm/in_flight.h"
#include "comm/layouts.h"
#include "comm/quiet.h"
#include "common/error.h"
#include "device/device_pool.h"

namespace dualpipe {
namespace {

using Clock = std::chrono::steady_clock;

// The program digest of the step in which ranks connect; no program has it.
constexpr std::uint64_t kMeeting = ~std::uint64_t{0};

constexpr std::chrono::milliseconds kPoll{1};
constexpr std::chrono::milliseconds kPatience{100};
// For a device that finishes nothing: at exit, and before an abort.
constexpr std::chrono::seconds kExitPatience{30};
constexpr std::chrono::seconds kAbortPatience{3};

// A stuck device must not fill its queues, of some 1000 entries: a thread that issues work would
// then wait in the driver, where no abort reaches it. A message takes about five entries.
constexpr std::size_t kMaxInFlight = 128;

std::vector<Piece> pieces_of(const Message& message) {
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < message.num_tensors(); ++i) {
    const std::uint64_t num_bytes = message.layout[i].num_bytes;
    if (num_bytes > 0) pieces.push_back({message.data[i], num_bytes});
  }
  return pieces;
}

// Waits until nothing is left, or until no less has been left for so long.
template <typename CountLeft>
void wait_while_fewer(Clock::duration patience, const CountLeft& count_left) {
  std::size_t num_left = count_left();
  auto deadline = Clock::now() + patience;
  while (num_left > 0 && Clock::now() < deadline) {
    std::this_thread::sleep_for(kPoll);
    if (const std::size_t left = count_left(); left != num_left) {
      num_left = left;
      deadline = Clock::now() + patience;
    }
  }
}

// A receive, issued as soon as its layout is known.
struct Incoming {
  MessageId id;
  std::unique_ptr<PendingReceive> description;  // null: the layout is known
  Layout layout;
  bool issued = false;
  Arrival arrival;
};
using IncomingPtr = std::shared_ptr<Incoming>;

struct Pools {
  DevicePool compute;
  std::map<const Stream*, DevicePool> reductions;
};

// What a destroyed transport leaves, to be released between steps.
struct Remains {
  Remains() = default;
  ~Remains();
  Remains(const Remains&) = delete;
  Remains& operator=(const Remains&) = delete;
  void keep_for_ever();

  std::shared_ptr<DeviceLink> link;
  std::shared_ptr<InFlight> in_flight;
  std::optional<Pools> pools;
};

Remains::~Remains() {
  try {
    link->abort();
    link->drain();  // before what is being sent is freed
  } catch (const std::exception&) {
    keep_for_ever();
  }
}

// The device is broken, or it is stuck and may still use this memory.
void Remains::keep_for_ever() {
  static std::mutex mutex;
  static auto* const kept = new std::vector<std::pair<std::shared_ptr<InFlight>, Pools>>;
  const std::lock_guard lock(mutex);
  if (pools) kept->emplace_back(std::move(in_flight), *std::move(pools));
}

class DeviceTransport final : public Transport {
 public:
  DeviceTransport(LinkMaker make_link, std::shared_ptr<Device> device,
                  std::unique_ptr<HostTransport> host, DeviceTransportOptions options)
      : make_link_(std::move(make_link)),
        device_(std::move(device)),
        host_(std::move(host)),
        options_(std::move(options)),
        ways_(options_.rank, options_.ways),
        unknown_(ways_.size()),
        in_flight_(std::make_shared<InFlight>(ways_.size())) {}
  ~DeviceTransport() override;

  void connect() override;
  void begin_step(const StepInfo& info) override;
  EventPtr send(Rank to, const MessageId& id, Message message, const EventPtr& ready) override;
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override;
  void end_step() override;
  void abort(const Failure& failure) noexcept override;
  void recover() override;
  [[nodiscard]] bool carries_device_memory() const override { return true; }
  std::optional<std::string> fault() override;
  bool busy() override { return !failure_.is_set() && in_flight_->any(); }

  // Blocks for the layout if it is not known yet, never for the device.
  [[nodiscard]] Arrival take(std::size_t way, const IncomingPtr& incoming);

 private:
  void wait_for_device() noexcept;
  void wait_for_earlier_steps() const noexcept;
  void meet(std::int64_t step);
  [[nodiscard]] std::shared_ptr<DeviceLink> link();
  [[nodiscard]] std::optional<std::size_t> find_way(Rank peer, MessageKind kind,
                                                    bool outgoing) const;
  [[nodiscard]] WayLayouts& layouts_of_way(std::size_t way) { return layouts_->ways[way]; }
  void describe(std::size_t way, Rank to, const MessageId& id, const Layout& layout);
  void issue(std::size_t way, Incoming& incoming);
  [[nodiscard]] DevicePool& pool_of(MessageKind kind);
  void wait_for_room(std::size_t way);
  void finish_issuing();
  [[nodiscard]] std::optional<std::string> overdue() const;
  template <typename Call>
  auto unless_failed(const Call& call);

  const LinkMaker make_link_;
  const std::shared_ptr<Device> device_;
  const std::unique_ptr<HostTransport> host_;
  const DeviceTransportOptions options_;
  const DeviceWays ways_;
  FailureFlag failure_;

  std::mutex mutex_;  // guards link_ for other threads than the engine's, which alone changes it
  std::shared_ptr<DeviceLink> link_;  // null: the ranks have yet to connect
  std::optional<Pools> pools_;        // of the link's memory

  std::vector<std::deque<IncomingPtr>> unknown_;  // by way: receives without a layout yet, in order
  const std::shared_ptr<InFlight> in_flight_;

  KnownLayouts known_;
  std::optional<StepLayouts> unkept_;  // of a step whose layouts must not be kept
  StepLayouts* layouts_ = nullptr;     // of the current step; null: none
  std::optional<StepUnderWay> under_way_;
};

class DeviceReceive final : public PendingReceive {
 public:
  DeviceReceive(DeviceTransport& transport, std::size_t way, IncomingPtr incoming)
      : transport_(transport), way_(way), incoming_(std::move(incoming)) {}
  Arrival wait() override { return transport_.take(way_, incoming_); }

 private:
  DeviceTransport& transport_;
  const std::size_t way_;
  const IncomingPtr incoming_;
};

// In the middle of a step peers wait for the link, so it is aborted at once. Otherwise nobody does.
DeviceTransport::~DeviceTransport() {
  wait_for_device();
  const Failure failure{options_.rank, 0, "the transport is gone"};
  if (under_way_) abort(failure);
  under_way_.reset();
  if (failure_.set(FailureFlag::Kind::kPipeline, failure.text)) host_->abort(failure);
  if (link_ == nullptr) return;
  auto remains = std::make_shared<Remains>();
  remains->link = std::move(link_);
  remains->in_flight = in_flight_;
  remains->pools = std::move(pools_);
  let_go_between_steps(std::move(remains));
}

// A step is done when all ranks have issued it; the devices of this rank and its peers may still be
// working on it. Waits for them as long as anything makes progress.
void DeviceTransport::wait_for_device() noexcept {
  try {
    wait_while_fewer(kExitPatience, [this]() -> std::size_t {
      return busy() && !fault() ? in_flight_->forget_done() : 0;
    });
  } catch (const std::exception&) {
    // The device is broken.
  }
}

// A failure of the link itself ends the link; one that the host transport knows of is thrown with
// its own message.
template <typename Call>
auto DeviceTransport::unless_failed(const Call& call) {
  failure_.throw_if_set();
  try {
    if (link_ != nullptr) (void)link_->progress();
    return call();
  } catch (const PipelineError&) {
    // If an abort came during the call, it has the reason. A peer that ends its step aborts its
    // link, and its reason arrives through the host transport.
    for (auto waited = kPoll; waited < kPatience; waited += kPoll) {
      failure_.throw_if_set();
      host_->throw_if_failed();
      std::this_thread::sleep_for(kPoll);
    }
    throw;
  }
}

void DeviceTransport::connect() {
  const StepUnderWay connecting;  // the device waits for other ranks here, too
  unless_failed([&] {
    if (link_ == nullptr) meet(0);
  });
}

void DeviceTransport::begin_step(const StepInfo& info) {
  unless_failed([&] {
    DUALPIPE_CHECK(layouts_ == nullptr, "begin_step within a step");
    under_way_.emplace();
    if (link_ == nullptr) meet(info.step);
    host_->begin_step(info);
    if (options_.dynamic_shapes) {
      layouts_ = &unkept_.emplace(ways_.size());
    } else {
      const HostTransport::Extremes all = host_->agree(info.shapes);
      const StepKind kind{info.program_digest, all.smallest, all.largest};
      layouts_ = &known_.of(kind, ways_.size());
    }
    for (WayLayouts& way : layouts_->ways) way.begin();
  });
}

// A step of the host transport that only connects the link.
void DeviceTransport::meet(std::int64_t step) {
  const std::shared_ptr<DeviceLink> made = make_link_();
  host_->begin_step({step, kMeeting, "the meeting of the ranks' GPUs", 0});
  const std::vector<Invitation> invitations = ways_.exchange_invitations(*made, *host_);
  host_->end_step();
  {
    const std::lock_guard lock(mutex_);
    link_ = made;
  }
  failure_.throw_if_set();  // by an abort before link_ was set
  const auto read_by = [&](Stream& stream) {
    return DevicePool(device_, stream, made->allocator());
  };
  pools_.emplace(Pools{read_by(device_->compute()), {}});
  for (std::size_t number = 0; number < Device::kNumReductions; ++number) {
    Stream& reduction = device_->reduction(number);
    pools_->reductions.try_emplace(&reduction, read_by(reduction));
  }
  made->connect(ways_.named(), invitations, options_.timeout);
}

EventPtr DeviceTransport::send(Rank to, const MessageId& id, Message message,
                               const EventPtr& ready) {
  return unless_failed([&]() -> EventPtr {
    const auto way = find_way(to, id.kind, true);
    if (!way) {
      DUALPIPE_CHECK(!message.on_device, "the ", to_string(id), " has no way from GPU to GPU");
      return host_->send(to, id, std::move(message), ready);
    }
    describe(*way, to, id, message.layout);
    const std::vector<Piece> pieces = pieces_of(message);
    if (pieces.empty()) return nullptr;
    wait_for_room(*way);
    EventPtr end = link_->transfer(*way, pieces, ready);
    in_flight_->add(*way, id, end, std::move(message.owner));
    return end;
  });
}

void DeviceTransport::describe(std::size_t way, Rank to, const MessageId& id,
                               const Layout& layout) {
  const Layout* const known = is_mirror(id.kind) ? nullptr : layouts_of_way(way).next();
  if (known == nullptr) {
    (void)host_->send(to, id, layout_message(layout), nullptr);
    if (!is_mirror(id.kind)) layouts_of_way(way).write_down(layout);
    return;
  }
  DUALPIPE_USER_CHECK(
      *known == layout, "rank ", options_.rank, ": the ", to_string(id), " is ", to_string(layout),
      "; it was ", to_string(*known),
      " in an earlier step whose inputs had the same shapes. Where shapes depend on more than "
      "those, or layers are frozen between steps, pass DualPipeConfig(dynamic_shapes=True)");
}

std::unique_ptr<PendingReceive> DeviceTransport::receive(Rank from, const MessageId& id) {
  return unless_failed([&]() -> std::unique_ptr<PendingReceive> {
    const auto way = find_way(from, id.kind, false);
    if (!way) return host_->receive(from, id);
    auto incoming = std::make_shared<Incoming>();
    incoming->id = id;
    const Layout* const known = is_mirror(id.kind) ? nullptr : layouts_of_way(*way).next();
    if (known != nullptr) {
      incoming->layout = *known;
      issue(*way, *incoming);
    } else {
      incoming->description = host_->receive(from, id);
      unknown_[*way].push_back(incoming);
    }
    return std::make_unique<DeviceReceive>(*this, *way, std::move(incoming));
  });
}

Arrival DeviceTransport::take(std::size_t way, const IncomingPtr& incoming) {
  return unless_failed([&] {
    while (!incoming->issued) {
      // The peer sends in order, so earlier receives come first.
      const IncomingPtr next = std::move(unknown_[way].front());
      unknown_[way].pop_front();
      next->layout = layout_of(next->description->wait().message);
      next->description.reset();
      if (!is_mirror(next->id.kind)) layouts_of_way(way).write_down(next->layout);
      issue(way, *next);
    }
    return std::move(incoming->arrival);
  });
}

void DeviceTransport::issue(std::size_t way, Incoming& incoming) {
  wait_for_room(way);
  DevicePool::Lease lease = pool_of(incoming.id.kind).acquire(packed_bytes(incoming.layout));
  incoming.arrival.message = unpack(incoming.layout, lease.data, lease.owner);
  incoming.arrival.message.on_device = true;
  incoming.issued = true;
  const std::vector<Piece> pieces = pieces_of(incoming.arrival.message);
  if (pieces.empty()) return;
  incoming.arrival.ready = link_->transfer(way, pieces, lease.free);
  in_flight_->add(way, incoming.id, incoming.arrival.ready, nullptr);
}

// Memory belongs to the stream that reads it.
DevicePool& DeviceTransport::pool_of(MessageKind kind) {
  if (!is_mirror(kind)) return pools_->compute;
  return pools_->reductions.at(&device_->reduction(reduction_of(kind)));
}

void DeviceTransport::wait_for_room(std::size_t way) {
  while (in_flight_->num_of(way) >= kMaxInFlight) {
    failure_.throw_if_set();
    std::this_thread::sleep_for(kPoll);
  }
}

void DeviceTransport::end_step() {
  unless_failed([&] {
    DUALPIPE_CHECK(layouts_ != nullptr, "end_step outside of a step");
    host_->end_step();
    in_flight_->commit();
    for (WayLayouts& way : layouts_->ways) way.commit();
    layouts_ = nullptr;
    finish_issuing();
    in_flight_->forget_done();
    under_way_.reset();
  });
}

// All hosts have issued all messages of the step. From now on none may depend on this host: it may
// wait for its device in a call that blocks the device calls of all its threads, as a copy to
// pageable memory does. The watchdog finds what fails here and the next call throws it, because the
// step is already done.
void DeviceTransport::finish_issuing() {
  while (!link_->progress() && !failure_.is_set()) std::this_thread::sleep_for(kPoll);
}

void DeviceTransport::abort(const Failure& failure) noexcept {
  if (!failure_.set(FailureFlag::Kind::kPipeline, failure.text)) return;
  host_->abort(failure);
  if (const std::shared_ptr<DeviceLink> live = link()) {
    wait_for_earlier_steps();
    live->abort();
  }
}

// Earlier steps have returned, and the caller may have issued an update by their gradients, of
// which a device may still be waiting for the last ones. All ranks have issued these messages, so
// they arrive by themselves, unless a rank is gone. Links do not tell such a rank from one that has
// only aborted, so the end of one says nothing of the messages of others.
void DeviceTransport::wait_for_earlier_steps() const noexcept {
  try {
    wait_while_fewer(kAbortPatience, [this] { return in_flight_->num_committed(); });
  } catch (const std::exception&) {
    // The device is broken.
  }
}

void DeviceTransport::recover() {
  abort({options_.rank, 0, "the step failed"});
  under_way_.reset();
  host_->recover();
  if (link_) link_->drain();
  in_flight_->clear();
  unknown_ = std::vector<std::deque<IncomingPtr>>(ways_.size());
  pools_.reset();  // nobody needs what was to be filled
  known_.clear();  // ranks that committed and ranks that did not must agree again
  layouts_ = nullptr;
  {
    const std::lock_guard lock(mutex_);
    link_.reset();
  }
  failure_.clear();
}

std::optional<std::string> DeviceTransport::fault() {
  const std::shared_ptr<DeviceLink> live = link();
  if (live == nullptr || failure_.is_set()) return std::nullopt;
  for (std::size_t way = 0; way < ways_.size(); ++way) {
    if (auto error = live->error(way, in_flight_->any_of(way))) return error;
  }
  return overdue();
}

std::shared_ptr<DeviceLink> DeviceTransport::link() {
  const std::lock_guard lock(mutex_);
  return link_;
}

std::optional<std::string> DeviceTransport::overdue() const {
  const auto late = in_flight_->overdue(options_.timeout);
  if (!late) return std::nullopt;
  const MessageWay& way = ways_[late->way];
  return cat("rank ", options_.rank, "'s GPU has waited longer than ",
             static_cast<double>(options_.timeout.count()) / 1000, " s for rank ", way.peer,
             way.outgoing ? " to take the " : " to send the ", to_string(late->id));
}

std::optional<std::size_t> DeviceTransport::find_way(Rank peer, MessageKind kind,
                                                     bool outgoing) const {
  DUALPIPE_CHECK(layouts_ != nullptr, "a message outside of a step");
  return ways_.find(peer, kind, outgoing);
}

}  // namespace

std::unique_ptr<Transport> device_transport(LinkMaker make_link, std::shared_ptr<Device> device,
                                            std::unique_ptr<HostTransport> host,
                                            DeviceTransportOptions options) {
  return std::make_unique<DeviceTransport>(std::move(make_link), std::move(device), std::move(host),
                                           std::move(options));
}

}  // namespace dualpipe
