#include "comm/nccl_link.h"

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "common/error.h"

namespace dualpipe {
namespace {

constexpr std::chrono::microseconds kPoll{50};
constexpr std::chrono::milliseconds kPatience{100};  // for the connecting thread
constexpr std::chrono::seconds kIssuePatience{1};    // for a thread that issues a message
constexpr std::chrono::seconds kDrainPatience{60};
constexpr std::size_t kScratchBytes = 512;  // a byte per way, each on its own cache lines

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

int index_of(Rank rank, Rank peer) { return rank < peer ? 0 : 1; }

}  // namespace

class NcclLink::State {
 public:
  State(std::shared_ptr<NcclCalls> calls, std::shared_ptr<Device> device, Rank rank,
        NcclOptions options)
      : calls_(std::move(calls)), device_(std::move(device)), rank_(rank), options_(options) {}

  [[nodiscard]] Invitation invite();
  void prepare(std::vector<DeviceWay> ways);
  // Runs on the connecting thread; await() gets the outcome.
  void bring_up(const std::vector<Invitation>& invitations) noexcept;
  void await(Clock::time_point deadline);
  [[nodiscard]] bool is_up_within(Clock::duration patience);
  [[nodiscard]] EventPtr transfer(Index way, const std::vector<Piece>& pieces,
                                  const EventPtr& ready);
  [[nodiscard]] std::shared_ptr<Allocator> allocator() { return device_->allocator(); }
  [[nodiscard]] std::optional<std::string> error(Index way);
  void abort() noexcept;
  void drain();

 private:
  struct Connection {
    DeviceWay way;
    NcclHandle comm = nullptr;  // null: not made yet, or aborted
    std::unique_ptr<Stream> stream;
  };

  void init(const std::vector<Invitation>& invitations);
  void adopt(const std::vector<NcclHandle>& made);
  void carry_a_byte();
  void await_first_bytes(Clock::time_point deadline);
  void issue(const Connection& connection, NcclHandle comm, const Piece& piece);
  [[nodiscard]] NcclHandle live_comm(const Connection& connection);
  void abort_all() noexcept;
  void check(NcclResult result, const char* what, const Connection* connection) const;
  void require_alive() const;
  [[noreturn]] void fail_to_connect(const std::string& way) const;

  const std::shared_ptr<NcclCalls> calls_;
  const std::shared_ptr<Device> device_;
  const Rank rank_;
  const NcclOptions options_;
  std::shared_ptr<std::byte> scratch_;  // for first bytes; kept while a device may write there

  // Held while a message is issued, which may wait for the device where its queue is full.
  std::mutex issuing_;
  // Guards the communicators and flags; its holders wait for nothing. The list of connections
  // itself is made once, before they are up.
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Connection> connections_;
  std::exception_ptr error_;  // of bring_up()
  bool is_up_ = false;        // bring_up() has finished
  bool aborted_ = false;
};

Invitation NcclLink::State::invite() {
  Invitation id{};
  const NcclResult result = calls_->get_unique_id(&id);
  check(result, "cannot start a communicator", nullptr);
  return id;
}

// Runs on the caller's thread: memory belongs to the current stream; the connecting thread has
// none.
void NcclLink::State::prepare(std::vector<DeviceWay> ways) {
  DUALPIPE_CHECK(connections_.empty(), "connected twice");
  const std::shared_ptr<Allocator> allocator = device_->allocator();
  scratch_ = std::shared_ptr<std::byte>(
      static_cast<std::byte*>(allocator->allocate(ways.size() * kScratchBytes)),
      [allocator](std::byte* data) { allocator->free(data); });
  const EventPtr free = device_->compute().record();
  std::vector<Connection> connections;
  for (DeviceWay& way : ways) {
    connections.push_back({std::move(way), nullptr, device_->new_stream()});
    connections.back().stream->wait(free);
  }
  const std::lock_guard lock(mutex_);
  connections_ = std::move(connections);
}

void NcclLink::State::bring_up(const std::vector<Invitation>& invitations) noexcept {
  std::exception_ptr error;
  try {
    init(invitations);
    carry_a_byte();
  } catch (...) {
    error = std::current_exception();
  }
  bool aborted = false;
  {
    const std::lock_guard lock(mutex_);
    error_ = std::move(error);
    is_up_ = true;
    aborted = aborted_;
  }
  if (aborted) abort_all();
  changed_.notify_all();
}

void NcclLink::State::init(const std::vector<Invitation>& invitations) {
  std::vector<NcclHandle> made(invitations.size(), nullptr);
  try {
    Group group(*calls_);
    check(group.start(), "cannot open a group", nullptr);
    for (std::size_t i = 0; i < invitations.size(); ++i) {
      const Connection& connection = connections_[i];
      const int index = index_of(rank_, connection.way.peer);
      check(calls_->init_pair(&made[i], invitations[i], index, options_), "cannot connect",
            &connection);
    }
    check(group.close(), "cannot connect", nullptr);
  } catch (...) {
    adopt(made);
    throw;
  }
  adopt(made);
}

void NcclLink::State::adopt(const std::vector<NcclHandle>& made) {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < made.size(); ++i) connections_[i].comm = made[i];
}

// The first message of a communicator makes the connection, which waits for the peer.
void NcclLink::State::carry_a_byte() {
  std::byte* place = scratch_.get();
  Group group(*calls_);
  check(group.start(), "cannot open a group", nullptr);
  for (const Connection& connection : connections_) {
    issue(connection, connection.comm, {place, 1});
    place += kScratchBytes;
  }
  check(group.close(), "cannot carry a byte", nullptr);
}

void NcclLink::State::await(Clock::time_point deadline) {
  {
    std::unique_lock lock(mutex_);
    const auto over = [this] { return is_up_ || aborted_; };
    const bool in_time = changed_.wait_until(lock, deadline, over);
    if (error_) std::rethrow_exception(error_);
    require_alive();
    if (!in_time) fail_to_connect(connections_.front().way.name);
  }
  await_first_bytes(deadline);
}

bool NcclLink::State::is_up_within(Clock::duration patience) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, patience, [this] { return is_up_; });
}

void NcclLink::State::await_first_bytes(Clock::time_point deadline) {
  for (const Connection& connection : connections_) {
    const EventPtr arrived = connection.stream->record();
    while (!arrived->done()) {
      {
        const std::lock_guard lock(mutex_);
        require_alive();
        if (Clock::now() > deadline) fail_to_connect(connection.way.name);
      }
      std::this_thread::sleep_for(kPoll);
    }
  }
}

EventPtr NcclLink::State::transfer(Index way, const std::vector<Piece>& pieces,
                                   const EventPtr& ready) {
  const Connection& connection = connections_.at(way);
  const std::lock_guard lock(issuing_);
  const NcclHandle comm = live_comm(connection);
  connection.stream->wait(ready);
  Group group(*calls_);
  check(group.start(), "cannot open a group", &connection);
  for (const Piece& piece : pieces) issue(connection, comm, piece);
  check(group.close(), "cannot issue a message", &connection);
  return connection.stream->record();
}

// The caller holds issuing_, so that the communicator stays.
NcclHandle NcclLink::State::live_comm(const Connection& connection) {
  const std::lock_guard lock(mutex_);
  require_alive();
  return connection.comm;
}

void NcclLink::State::issue(const Connection& connection, NcclHandle comm, const Piece& piece) {
  const int peer = index_of(connection.way.peer, rank_);
  const NcclResult result =
      connection.way.outgoing
          ? calls_->send(piece.data, piece.num_bytes, peer, comm, *connection.stream)
          : calls_->receive(piece.data, piece.num_bytes, peer, comm, *connection.stream);
  check(result, connection.way.outgoing ? "cannot send" : "cannot receive", &connection);
}

std::optional<std::string> NcclLink::State::error(Index way) {
  const std::lock_guard lock(mutex_);
  if (!is_up_) return std::nullopt;
  const Connection& connection = connections_.at(way);
  if (connection.comm == nullptr) return std::nullopt;
  NcclResult state = NcclResult::kSuccess;
  const NcclResult asked = calls_->async_error(connection.comm, &state);
  const NcclResult worse = asked == NcclResult::kSuccess ? state : asked;
  if (worse == NcclResult::kSuccess || worse == NcclResult::kInProgress) return std::nullopt;
  return cat("rank ", rank_, ": ", connection.way.name, ": ", calls_->describe(worse));
}

// While the connecting thread is inside NCCL with these communicators, bring_up() is left to abort
// them afterwards.
void NcclLink::State::abort() noexcept {
  bool is_up = false;
  {
    const std::lock_guard lock(mutex_);
    aborted_ = true;
    is_up = is_up_;
  }
  changed_.notify_all();
  if (is_up) abort_all();
}

// Aborts all at once: the end of one may wait for the device, where kernels of the others wait for
// their peers. A thread that has been issuing a message for so long waits for these kernels itself,
// so nothing else can free it; NCCL does not promise that such an abort works, as it frees what
// that thread uses, but without it the rank would hang.
void NcclLink::State::abort_all() noexcept {
  std::unique_lock issuing(issuing_, std::defer_lock);
  const auto deadline = Clock::now() + kIssuePatience;
  while (!issuing.try_lock() && Clock::now() < deadline) std::this_thread::sleep_for(kPoll);
  std::vector<NcclHandle> comms;
  {
    const std::lock_guard lock(mutex_);
    for (Connection& connection : connections_) {
      if (connection.comm != nullptr) comms.push_back(std::exchange(connection.comm, nullptr));
    }
  }
  if (issuing) issuing.unlock();  // others find no communicator any more, and need not wait
  if (!comms.empty()) (void)calls_->abort(comms);
}

void NcclLink::State::drain() {
  for (const Connection& connection : connections_) {
    if (done_within(*connection.stream->record(), kDrainPatience)) continue;
    throw PipelineError(cat("rank ", rank_, ": ", connection.way.name,
                            ": its GPU has not come to an end ", kDrainPatience.count(),
                            " s after the communicators were aborted"));
  }
}

void NcclLink::State::check(NcclResult result, const char* what,
                            const Connection* connection) const {
  if (result == NcclResult::kSuccess) return;
  const std::string place = connection == nullptr ? "" : cat(connection->way.name, ": ");
  throw PipelineError(cat("rank ", rank_, ": ", place, what, ": ", calls_->describe(result)));
}

void NcclLink::State::require_alive() const {
  if (aborted_) throw PipelineError(cat("rank ", rank_, ": the communicators were aborted"));
}

void NcclLink::State::fail_to_connect(const std::string& way) const {
  throw PipelineError(cat("rank ", rank_, " waited too long for NCCL to connect the ", way,
                          "; does every rank run, on a GPU that the others can reach?"));
}

NcclLink::NcclLink(std::shared_ptr<NcclCalls> calls, std::shared_ptr<Device> device, Rank rank,
                   NcclOptions options)
    : state_(std::make_shared<State>(std::move(calls), std::move(device), rank, options)) {}

// Aborts instead of destroying in order, which could wait for a peer that is gone. The connecting
// thread may be waiting for one, too; it is then left behind with the state that it uses, as nobody
// can tell how long it will be there.
NcclLink::~NcclLink() {
  abort();
  if (!connecting_.joinable()) return;
  if (state_->is_up_within(kPatience)) {
    connecting_.join();
    return;
  }
  static std::mutex mutex;
  static auto* const left_behind = new std::vector<std::shared_ptr<State>>;
  const std::lock_guard lock(mutex);
  left_behind->push_back(state_);
  connecting_.detach();
}

Invitation NcclLink::invite() { return state_->invite(); }

void NcclLink::connect(std::vector<DeviceWay> ways, const std::vector<Invitation>& invitations,
                       Clock::duration timeout) {
  DUALPIPE_CHECK(ways.size() == invitations.size(), ways.size(), " ways, ", invitations.size(),
                 " invitations");
  const Clock::time_point deadline = Clock::now() + timeout;
  if (ways.empty()) return;
  state_->prepare(std::move(ways));
  connecting_ = std::thread([state = state_, invitations] { state->bring_up(invitations); });
  state_->await(deadline);
}

EventPtr NcclLink::transfer(Index way, const std::vector<Piece>& pieces, const EventPtr& ready) {
  return state_->transfer(way, pieces, ready);
}

std::shared_ptr<Allocator> NcclLink::allocator() { return state_->allocator(); }
std::optional<std::string> NcclLink::error(Index way, bool is_busy) {
  return is_busy ? state_->error(way) : std::nullopt;
}
void NcclLink::abort() noexcept { state_->abort(); }
void NcclLink::drain() { state_->drain(); }

}  // namespace dualpipe
