#include "comm/memory_link.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>

#include "common/error.h"

namespace dualpipe::testing {
namespace {

struct Transfer {
  std::byte* data;
  std::size_t num_bytes;
  Rank from;
  Rank to;
  bool done = false;
  bool aborted = false;
  bool broken = false;
  bool alive = true;  // its operation exists, and so does the memory
};

struct Queue {
  std::deque<std::shared_ptr<Transfer>> sends;
  std::deque<std::shared_ptr<Transfer>> receives;
};

}  // namespace

struct LinkFabric::State {
  std::mutex mutex;
  std::condition_variable cv;
  std::map<std::tuple<Rank, Rank, std::uint32_t>, Queue> queues;
  std::set<Rank> dead;
  int num_messages = 0;

  void match(Queue& queue) {
    while (!queue.sends.empty() && !queue.receives.empty()) {
      Transfer& source = *queue.sends.front();
      Transfer& target = *queue.receives.front();
      EXPECT_TRUE(source.alive && target.alive) << "the memory of a pending operation is gone";
      EXPECT_LE(source.num_bytes, target.num_bytes) << "longer than what was posted";
      if (source.num_bytes <= target.num_bytes) {
        std::memcpy(target.data, source.data, source.num_bytes);
      }
      source.done = target.done = true;
      queue.sends.pop_front();
      queue.receives.pop_front();
    }
  }

  void check_alive(const Transfer& transfer) const {
    if (dead.contains(transfer.from) || dead.contains(transfer.to)) {
      throw PipelineError("connection closed by peer");
    }
  }
};

namespace {

class MemoryOperation final : public ByteOperation {
 public:
  MemoryOperation(std::shared_ptr<LinkFabric::State> state, std::shared_ptr<Transfer> transfer)
      : state_(std::move(state)), transfer_(std::move(transfer)) {}
  ~MemoryOperation() override {
    const std::lock_guard lock(state_->mutex);
    transfer_->alive = false;
  }
  bool wait() override {
    std::unique_lock lock(state_->mutex);
    Transfer& transfer = *transfer_;
    state_->cv.wait(lock, [&] { return transfer.done || transfer.aborted || transfer.broken; });
    if (transfer.broken && !transfer.done) throw PipelineError("connection closed by peer");
    return !transfer.aborted;
  }
  void abort() noexcept override {
    {
      const std::lock_guard lock(state_->mutex);
      transfer_->aborted = true;
    }
    state_->cv.notify_all();
  }

 private:
  const std::shared_ptr<LinkFabric::State> state_;
  const std::shared_ptr<Transfer> transfer_;
};

class MemoryLink final : public ByteLink {
 public:
  MemoryLink(std::shared_ptr<LinkFabric::State> state, Rank rank)
      : state_(std::move(state)), rank_(rank) {}

  std::unique_ptr<ByteOperation> send(Rank to, std::uint32_t tag, std::byte* data,
                                      std::size_t num_bytes) override {
    return post(std::make_shared<Transfer>(Transfer{data, num_bytes, rank_, to}), tag,
                &Queue::sends);
  }
  std::unique_ptr<ByteOperation> receive(Rank from, std::uint32_t tag, std::byte* data,
                                         std::size_t capacity) override {
    return post(std::make_shared<Transfer>(Transfer{data, capacity, from, rank_}), tag,
                &Queue::receives);
  }

 private:
  std::unique_ptr<ByteOperation> post(std::shared_ptr<Transfer> transfer, std::uint32_t tag,
                                      std::deque<std::shared_ptr<Transfer>> Queue::*side) {
    {
      const std::lock_guard lock(state_->mutex);
      state_->check_alive(*transfer);
      Queue& queue = state_->queues[{transfer->from, transfer->to, tag}];
      (queue.*side).push_back(transfer);
      if (side == &Queue::sends) ++state_->num_messages;
      state_->match(queue);
    }
    state_->cv.notify_all();
    return std::make_unique<MemoryOperation>(state_, std::move(transfer));
  }

  const std::shared_ptr<LinkFabric::State> state_;
  const Rank rank_;
};

}  // namespace

LinkFabric::LinkFabric() : state_(std::make_shared<State>()) {}
LinkFabric::~LinkFabric() = default;

std::unique_ptr<ByteLink> LinkFabric::link(Rank rank) {
  return std::make_unique<MemoryLink>(state_, rank);
}

void LinkFabric::kill(Rank rank) {
  {
    const std::lock_guard lock(state_->mutex);
    state_->dead.insert(rank);
    for (auto& [key, queue] : state_->queues) {
      if (std::get<0>(key) != rank && std::get<1>(key) != rank) continue;
      for (auto* side : {&queue.sends, &queue.receives}) {
        for (auto& transfer : *side) transfer->broken = true;
        side->clear();
      }
    }
  }
  state_->cv.notify_all();
}

int LinkFabric::num_messages() const {
  const std::lock_guard lock(state_->mutex);
  return state_->num_messages;
}

struct SharedStore::State {
  std::mutex mutex;
  std::condition_variable thawed;
  bool frozen = false;
  std::map<std::string, std::string> values;
  bool dead = false;
};

namespace {

class MemoryStore final : public KeyValueStore {
 public:
  explicit MemoryStore(std::shared_ptr<SharedStore::State> state) : state_(std::move(state)) {}

  void set(const std::string& key, const std::string& value) override {
    const auto lock = enter();
    state_->values[key] = value;
  }
  std::string get(const std::string& key) override {
    const auto lock = enter();
    return state_->values.at(key);
  }
  bool has(const std::vector<std::string>& keys) override {
    const auto lock = enter();
    for (const std::string& key : keys) {
      if (!state_->values.contains(key)) return false;
    }
    return true;
  }
  void set_first(const std::string& key, const std::string& value) override {
    const auto lock = enter();
    state_->values.try_emplace(key, value);
  }
  std::int64_t add(const std::string& key, std::int64_t amount) override {
    const auto lock = enter();
    std::string& value = state_->values.try_emplace(key, "0").first->second;
    const std::int64_t sum = std::stoll(value) + amount;
    value = std::to_string(sum);
    return sum;
  }
  void remove(const std::string& key) override {
    const auto lock = enter();
    state_->values.erase(key);
  }

 private:
  std::unique_lock<std::mutex> enter() const {
    std::unique_lock lock(state_->mutex);
    state_->thawed.wait(lock, [this] { return !state_->frozen; });
    if (state_->dead) throw PipelineError("the store is gone");
    return lock;
  }
  const std::shared_ptr<SharedStore::State> state_;
};

}  // namespace

SharedStore::SharedStore() : state_(std::make_shared<State>()) {}
SharedStore::~SharedStore() = default;

std::unique_ptr<KeyValueStore> SharedStore::open() { return std::make_unique<MemoryStore>(state_); }

void SharedStore::kill() {
  const std::lock_guard lock(state_->mutex);
  state_->dead = true;
}

void SharedStore::freeze() {
  const std::lock_guard lock(state_->mutex);
  state_->frozen = true;
}

void SharedStore::thaw() {
  const std::lock_guard lock(state_->mutex);
  state_->frozen = false;
  state_->thawed.notify_all();
}

std::size_t SharedStore::num_keys() const {
  const std::lock_guard lock(state_->mutex);
  return state_->values.size();
}

}  // namespace dualpipe::testing
