#include "torch/process_group_transport.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <optional>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "comm/framed_transport.h"
#include "comm/limited_store.h"
#include "comm/thread_policy.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using Clock = std::chrono::steady_clock;

// gloo breaks all connections of the group when a wait reaches its time limit, and a wait without
// one gets the group's. Here the watchdog ends waits instead.
constexpr std::chrono::milliseconds kForever = std::chrono::hours(24 * 365 * 10);

// Strips the advice that gloo adds to its messages, and the C++ stack that torch adds.
std::string brief(std::string text) {
  for (const char* addition : {" This is typically caused", "\nException raised from"}) {
    text.resize(std::min(text.size(), text.find(addition)));
  }
  return text;
}

template <typename Function>
auto or_pipeline_error(const char* what, Function function) {
  try {
    return function();
  } catch (const PipelineError&) {
    throw;
  } catch (const std::exception& error) {
    throw PipelineError(cat(what, ": ", brief(error.what())));
  }
}

class WorkOperation final : public ByteOperation {
 public:
  WorkOperation(c10::intrusive_ptr<c10d::Work> work, at::Tensor tensor)
      : work_(std::move(work)), tensor_(std::move(tensor)) {}

  bool wait() override {
    return or_pipeline_error("the connection broke (a rank whose process has ended says why)",
                             [this] { return work_->wait(kForever); });
  }
  void abort() noexcept override {
    try {
      work_->abort();
    } catch (const std::exception&) {
      // A backend that cannot abort: its waits end by themselves or with the process group.
    }
  }

 private:
  const c10::intrusive_ptr<c10d::Work> work_;
  const at::Tensor tensor_;  // not every backend keeps it alive
};

class BackendLink final : public ByteLink {
 public:
  BackendLink(c10::intrusive_ptr<c10d::Backend> backend, std::vector<int> group_ranks)
      : backend_(std::move(backend)), group_ranks_(std::move(group_ranks)) {}

  std::unique_ptr<ByteOperation> send(Rank to, std::uint32_t tag, std::byte* data,
                                      std::size_t num_bytes) override {
    return post(data, num_bytes, [&](std::vector<at::Tensor>& tensors) {
      return backend_->send(tensors, group_ranks_[to.index()], static_cast<int>(tag));
    });
  }
  std::unique_ptr<ByteOperation> receive(Rank from, std::uint32_t tag, std::byte* data,
                                         std::size_t capacity) override {
    return post(data, capacity, [&](std::vector<at::Tensor>& tensors) {
      return backend_->recv(tensors, group_ranks_[from.index()], static_cast<int>(tag));
    });
  }

 private:
  template <typename Issue>
  static std::unique_ptr<ByteOperation> post(std::byte* data, std::size_t num_bytes, Issue issue) {
    std::vector<at::Tensor> tensors = {
        at::from_blob(data, {static_cast<std::int64_t>(num_bytes)}, at::kByte)};
    auto work = or_pipeline_error("the connection is broken", [&] { return issue(tensors); });
    return std::make_unique<WorkOperation>(std::move(work), std::move(tensors.front()));
  }

  const c10::intrusive_ptr<c10d::Backend> backend_;
  const std::vector<int> group_ranks_;  // by rank of the pipeline
};

// gloo's event loop never blocks on the lock of a connection: it polls the socket until the lock is
// free. If it preempts the thread that holds the lock, in the middle of a send, it polls for a
// whole time slice while nothing moves: that took three quarters of a step of short actions.
constexpr const char* kGlooLoop = "gloo_tcp_loop";

template <typename Function>
auto call(Function function) {
  return or_pipeline_error("the rank that hosts the process group's store is gone", function);
}

// Uses a connection of its own, made by the first call, so that waiting for a key on another one
// holds up nobody here. One thread at a time, which is LimitedStore's.
class C10dStore final : public KeyValueStore {
 public:
  C10dStore(std::string prefix, c10::intrusive_ptr<c10d::Store> original)
      : prefix_(std::move(prefix)), original_(std::move(original)) {}

  void set(const std::string& key, const std::string& value) override {
    call([&] { store().c10d::Store::set(key, value); });
  }
  std::string get(const std::string& key) override {
    return call([&] { return store().get_to_str(key); });
  }
  bool has(const std::vector<std::string>& keys) override {
    return call([&] { return store().check(keys); });
  }
  void set_first(const std::string& key, const std::string& value) override {
    call([&] { store().c10d::Store::compareSet(key, "", value); });
  }
  std::int64_t add(const std::string& key, std::int64_t amount) override {
    return call([&] { return store().add(key, amount); });
  }
  void remove(const std::string& key) override {
    call([&] { store().deleteKey(key); });
  }

 private:
  c10d::PrefixStore& store() {
    if (!store_) {
      store_.emplace(prefix_, original_->clone());
      original_.reset();
    }
    return *store_;
  }

  const std::string prefix_;
  c10::intrusive_ptr<c10d::Store> original_;  // null: not needed any more
  std::optional<c10d::PrefixStore> store_;
};

// Longer than a live store takes to answer, however busy its machine.
constexpr std::chrono::seconds kStorePatience{10};
constexpr std::chrono::seconds kConnectPatience{60};  // all ranks of a job connect at once

void connect(KeyValueStore& keys) {
  const Clock::time_point deadline = Clock::now() + kConnectPatience;
  for (;;) {
    try {
      (void)keys.has({"any"});
      return;
    } catch (const NoAnswer&) {
      if (Clock::now() >= deadline) throw;
    }
  }
}

std::unique_ptr<KeyValueStore> keys_of(const c10d::ProcessGroup& group, std::string prefix) {
  auto store = group.getStore();
  DUALPIPE_USER_CHECK(store,
                      "the process group has no store: make it with init_process_group() "
                      "or new_group()");
  auto keys = limited_store(std::make_unique<C10dStore>(std::move(prefix), std::move(store)),
                            kStorePatience);
  connect(*keys);
  return keys;
}

// Per-rank counters start anew if an earlier group with the same store had another size.
std::string prefix_of(const c10d::ProcessGroup& group) {
  return cat("dualpipe_ext/ranks of ", group.getSize());
}

constexpr std::chrono::milliseconds kInterruptPoll{100};

void await(c10d::Work& work, Clock::time_point start, std::chrono::milliseconds timeout,
           const std::function<bool()>& interrupted) {
  for (;;) {
    const bool was_done = work.isCompleted();  // before: work may end while a wait gives it up
    try {
      work.wait(kInterruptPoll);
      return;
    } catch (const std::exception&) {
      if (was_done) throw;
      if (Clock::now() - start >= timeout) {
        throw PipelineError(cat("waited ", static_cast<double>(timeout.count()) / 1000,
                                " s for the other ranks: call this on every rank, or allow more "
                                "time; the process group is of no use any more"));
      }
    }
    if (interrupted()) throw PipelineError("interrupted (Ctrl-C)");
  }
}

c10::intrusive_ptr<c10d::Backend> cpu_backend(c10d::ProcessGroup& group) {
  DUALPIPE_CHECK(has_cpu_backend(group), "the process group (", group.getBackendName(),
                 ") has no backend for CPU tensors");
  return group.getBackend(c10::DeviceType::CPU);
}

}  // namespace

ProcessGroupEnds process_group_ends(c10d::ProcessGroup& group, Rank rank,
                                    std::vector<int> group_ranks, std::vector<Rank> peers) {
  const int num_ranks = static_cast<int>(group_ranks.size());
  auto backend = cpu_backend(group);
  never_preempt(kGlooLoop);
  const auto counters = keys_of(group, prefix_of(group));
  const std::int64_t instance = counters->add(cat("pipelines/", rank), 1) - 1;
  auto keys = keys_of(group, cat(prefix_of(group), "/pipeline/", instance));
  auto link = std::make_unique<BackendLink>(std::move(backend), std::move(group_ranks));
  FramedOptions options{rank, num_ranks, std::move(peers), static_cast<std::uint32_t>(instance)};
  return {framed_transport(std::move(link), std::move(options)),
          store_control_plane(std::move(keys), rank, num_ranks)};
}

std::unique_ptr<StoreExchange> process_group_exchange(c10d::ProcessGroup& group, Rank rank,
                                                      std::function<bool()> interrupted) {
  auto keys = keys_of(group, prefix_of(group));
  return std::make_unique<StoreExchange>(std::move(keys), rank, group.getSize(),
                                         std::move(interrupted));
}

bool has_cpu_backend(const c10d::ProcessGroup& group) {
  const std::vector<c10::Device> devices = group.getDeviceTypes();
  return std::any_of(devices.begin(), devices.end(),
                     [](const c10::Device& device) { return device.is_cpu(); });
}

std::vector<std::vector<double>> process_group_all_gather(
    c10d::ProcessGroup& group, const std::vector<double>& values, std::chrono::milliseconds timeout,
    const std::function<bool()>& interrupted) {
  std::vector<at::Tensor> own = {at::tensor(values, at::kDouble)};
  std::vector<std::vector<at::Tensor>> gathered(1);
  for (int rank = 0; rank < group.getSize(); ++rank) gathered[0].push_back(at::empty_like(own[0]));
  const auto backend = cpu_backend(group);
  c10d::AllgatherOptions options;
  // gloo gets the limit, too: if its own thread kept waiting, the process could not exit. At the
  // limit gloo breaks all connections of the group, so that late ranks fail as well.
  options.timeout = std::min(timeout, kForever);
  const Clock::time_point start = Clock::now();
  or_pipeline_error(
      "the ranks' numbers cannot be gathered (a rank whose process has ended says why)",
      [&] { await(*backend->allgather(gathered, own, options), start, timeout, interrupted); });
  std::vector<std::vector<double>> by_rank;
  for (const at::Tensor& found : gathered[0]) {
    const double* first = found.const_data_ptr<double>();
    by_rank.emplace_back(first, first + found.numel());
  }
  return by_rank;
}

const std::type_info& process_group_type() { return typeid(c10d::ProcessGroup); }

}  // namespace dualpipe
