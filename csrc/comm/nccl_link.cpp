#include "comm/nccl_link.h"

#include <algorithm>
#include <thread>

#include "common/error.h"

namespace dualpipe {
namespace {

constexpr std::chrono::microseconds kPoll{50};
constexpr std::size_t kScratchBytes = 512;  // a byte a way, each on lines of its own

// A group is closed on every path: one that stays open swallows all later calls of its thread.
class Group {
 public:
  explicit Group(NcclCalls& calls) : calls_(calls), start_(calls.group_start()) {}
  ~Group() {
    if (!closed_ && start_ == NcclResult::kSuccess) (void)calls_.group_end();
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  [[nodiscard]] NcclResult start() const { return start_; }
  [[nodiscard]] NcclResult close() {
    closed_ = true;
    return calls_.group_end();
  }

 private:
  NcclCalls& calls_;
  const NcclResult start_;
  bool closed_ = false;
};

class Scratch {
 public:
  Scratch(Device& device, std::size_t num_bytes)
      : allocator_(device.allocator()),
        data_(static_cast<std::byte*>(allocator_->allocate(num_bytes))) {}
  ~Scratch() { allocator_->free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  [[nodiscard]] std::byte* data() const { return data_; }

 private:
  const std::shared_ptr<Allocator> allocator_;
  std::byte* const data_;
};

}  // namespace

NcclLink::NcclLink(NcclCalls& calls, Device& device, Rank rank, NcclOptions options)
    : calls_(calls), device_(device), rank_(rank), options_(options) {}

// Not destroyed in order: that could wait for a peer that is gone.
NcclLink::~NcclLink() { abort(); }

NcclUniqueId NcclLink::new_id() {
  NcclUniqueId id{};
  check(calls_.get_unique_id(&id), "cannot start a communicator", nullptr);
  return id;
}

void NcclLink::connect(std::vector<NcclWay> ways, const std::vector<NcclUniqueId>& ids,
                       Clock::duration timeout) {
  DUALPIPE_CHECK(ways.size() == ids.size(), ways.size(), " ways, ", ids.size(), " ids");
  const Clock::time_point deadline = Clock::now() + timeout;
  {
    const std::lock_guard lock(mutex_);
    DUALPIPE_CHECK(connections_.empty(), "connected twice");
    for (NcclWay& way : ways) {
      connections_.push_back({std::move(way), nullptr, device_.new_stream()});
    }
    init(ids);
  }
  settle("the communicators come up", deadline);
  const Scratch scratch(device_, std::max<std::size_t>(1, connections_.size()) * kScratchBytes);
  {
    const std::lock_guard lock(mutex_);
    require_alive();
    carry_a_byte(scratch.data());
  }
  settle("the first bytes arrive", deadline);
  for (const Connection& connection : connections_) {
    const EventPtr arrived = connection.stream->record();
    while (!arrived->done() && Clock::now() < deadline && !error())
      std::this_thread::sleep_for(kPoll);
    const std::lock_guard lock(mutex_);
    require_alive();
    if (!arrived->done()) fail(NcclResult::kInProgress, connection.way.name, connection.comm);
  }
}

void NcclLink::init(const std::vector<NcclUniqueId>& ids) {
  Group group(calls_);
  check(group.start(), "cannot open a group", nullptr);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    Connection& connection = connections_[i];
    const int index = index_of(rank_, connection.way.peer);
    check(calls_.init_pair(&connection.comm, ids[i], index, options_), "cannot connect",
          &connection);
  }
  check(group.close(), "cannot connect", nullptr);
}

void NcclLink::carry_a_byte(std::byte* scratch) {
  Group group(calls_);
  check(group.start(), "cannot open a group", nullptr);
  for (const Connection& connection : connections_) {
    issue(connection, {scratch, 1});
    scratch += kScratchBytes;
  }
  check(group.close(), "cannot carry a byte", nullptr);
}

EventPtr NcclLink::transfer(Index way, const std::vector<NcclPiece>& pieces,
                            const EventPtr& ready) {
  const std::lock_guard lock(mutex_);
  require_alive();
  const Connection& connection = connections_.at(way);
  connection.stream->wait(ready);
  Group group(calls_);
  check(group.start(), "cannot open a group", &connection);
  for (const NcclPiece& piece : pieces) issue(connection, piece);
  check(group.close(), "cannot issue a message", &connection);
  return connection.stream->record();
}

void NcclLink::issue(const Connection& connection, const NcclPiece& piece) {
  const int peer = index_of(connection.way.peer, rank_);
  const NcclResult result =
      connection.way.outgoing
          ? calls_.send(piece.data, piece.num_bytes, peer, connection.comm, *connection.stream)
          : calls_.receive(piece.data, piece.num_bytes, peer, connection.comm, *connection.stream);
  check(result, connection.way.outgoing ? "cannot send" : "cannot receive", &connection);
}

std::optional<std::string> NcclLink::error() {
  const std::lock_guard lock(mutex_);
  for (const Connection& connection : connections_) {
    if (connection.comm == nullptr) continue;
    NcclResult state = NcclResult::kSuccess;
    const NcclResult asked = calls_.async_error(connection.comm, &state);
    const NcclResult worse = asked == NcclResult::kSuccess ? state : asked;
    if (worse == NcclResult::kSuccess || worse == NcclResult::kInProgress) continue;
    return cat("rank ", rank_, ": ", connection.way.name, ": ",
               calls_.describe(worse, connection.comm));
  }
  return std::nullopt;
}

void NcclLink::abort() noexcept {
  const std::lock_guard lock(mutex_);
  aborted_ = true;
  for (Connection& connection : connections_) {
    if (connection.comm == nullptr) continue;
    (void)calls_.abort(std::exchange(connection.comm, nullptr));
  }
}

void NcclLink::drain() {
  for (const Connection& connection : connections_) connection.stream->record()->synchronize();
}

// Waits until no communicator is busy with what it was asked for.
void NcclLink::settle(const char* what, Clock::time_point deadline) {
  for (std::size_t i = 0; i < connections_.size();) {
    NcclResult state = NcclResult::kSuccess;
    {
      const std::lock_guard lock(mutex_);
      require_alive();
      check(calls_.async_error(connections_[i].comm, &state), what, &connections_[i]);
      if (state != NcclResult::kInProgress) {
        check(state, what, &connections_[i]);
        ++i;
        continue;
      }
      if (Clock::now() > deadline) {
        fail(state, cat("until ", what), connections_[i].comm);
      }
    }
    std::this_thread::sleep_for(kPoll);
  }
}

void NcclLink::check(NcclResult result, const char* what, const Connection* connection) const {
  if (result == NcclResult::kSuccess || result == NcclResult::kInProgress) return;
  fail(result, connection == nullptr ? what : cat(connection->way.name, ": ", what),
       connection == nullptr ? nullptr : connection->comm);
}

void NcclLink::require_alive() const {
  if (aborted_) throw PipelineError(cat("rank ", rank_, ": the communicators were aborted"));
}

void NcclLink::fail(NcclResult result, const std::string& what, NcclHandle comm) const {
  if (result == NcclResult::kInProgress) {
    throw PipelineError(cat("rank ", rank_, " waited too long ", what,
                            "; does every rank run, on a GPU that the others can reach?"));
  }
  throw PipelineError(cat("rank ", rank_, ": ", what, ": ", calls_.describe(result, comm)));
}

}  // namespace dualpipe
