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

}  // namespace

NcclLink::NcclLink(NcclCalls& calls, Device& device, Rank rank, NcclOptions options)
    : calls_(calls), device_(device), rank_(rank), options_(options) {}

// Not destroyed in order: that could wait for a peer that is gone.
NcclLink::~NcclLink() { abort(); }

void NcclLink::connect(std::vector<NcclWay> ways, const std::vector<NcclUniqueId>& ids,
                       Clock::duration timeout) {
  DUALPIPE_CHECK(ways.size() == ids.size(), ways.size(), " ways, ", ids.size(), " ids");
  timeout_ = timeout;
  {
    const std::lock_guard lock(mutex_);
    DUALPIPE_CHECK(connections_.empty(), "connected twice");
    for (NcclWay& way : ways) {
      connections_.push_back({std::move(way), nullptr, device_.new_stream()});
    }
    init(ids);
  }
  settle_all("cannot connect");
  {
    const std::lock_guard lock(mutex_);
    require_alive();
    carry_a_byte();
  }
  settle_all("cannot carry a byte");
  const Clock::time_point deadline = Clock::now() + timeout_;
  for (const Connection& connection : connections_) {
    const EventPtr arrived = connection.stream->record();
    while (!arrived->done()) {
      {
        const std::lock_guard lock(mutex_);
        require_alive();
        if (Clock::now() > deadline) fail(NcclResult::kInProgress, connection.way.name, nullptr);
      }
      std::this_thread::sleep_for(kPoll);
    }
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

void NcclLink::carry_a_byte() {
  allocator_ = device_.allocator();
  std::byte* place = static_cast<std::byte*>(
      allocator_->allocate(std::max<std::size_t>(1, connections_.size()) * kScratchBytes));
  scratch_ = std::shared_ptr<void>(place, [from = allocator_](void* data) { from->free(data); });
  const EventPtr free = device_.record();
  Group group(calls_);
  check(group.start(), "cannot open a group", nullptr);
  for (const Connection& connection : connections_) {
    connection.stream->wait(free);
    issue(connection, {place, 1});
    place += kScratchBytes;
  }
  check(group.close(), "cannot carry a byte", nullptr);
}

EventPtr NcclLink::transfer(Index way, const std::vector<NcclPiece>& pieces,
                            const EventPtr& ready) {
  const Connection& connection = connections_.at(way);
  {
    const std::lock_guard lock(mutex_);
    require_alive();
    connection.stream->wait(ready);
    Group group(calls_);
    check(group.start(), "cannot open a group", &connection);
    for (const NcclPiece& piece : pieces) issue(connection, piece);
    check(group.close(), "cannot issue a message", &connection);
  }
  settle(connection, "cannot issue a message");
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

void NcclLink::settle_all(const char* what) {
  for (const Connection& connection : connections_) settle(connection, what);
}

// Waits until a communicator is through with what it was asked for: before that, an event of its
// stream says nothing of it, and it takes no other call. An abort may come in between.
void NcclLink::settle(const Connection& connection, const char* what) {
  const Clock::time_point deadline = Clock::now() + timeout_;
  while (true) {
    {
      const std::lock_guard lock(mutex_);
      require_alive();
      NcclResult state = NcclResult::kSuccess;
      check(calls_.async_error(connection.comm, &state), what, &connection);
      check(state, what, &connection);
      if (state != NcclResult::kInProgress) return;
      if (Clock::now() > deadline) fail(state, connection.way.name, connection.comm);
    }
    std::this_thread::yield();
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
    throw PipelineError(cat("rank ", rank_, " waited too long for NCCL to connect ", what,
                            "; does every rank run, on a GPU that the others can reach?"));
  }
  throw PipelineError(cat("rank ", rank_, ": ", what, ": ", calls_.describe(result, comm)));
}

}  // namespace dualpipe
