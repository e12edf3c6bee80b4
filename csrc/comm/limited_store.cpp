#include "comm/limited_store.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>

#include "common/error.h"

namespace dualpipe {
namespace {

using std::chrono::milliseconds;
using Task = std::shared_ptr<std::function<void()>>;

constexpr int kImpatience = 100;

template <typename Call>
using Answer = std::invoke_result_t<Call, KeyValueStore&>;

// The state of the thread, which may outlive the LimitedStore.
struct Work {
  explicit Work(std::unique_ptr<KeyValueStore> store_in) : store(std::move(store_in)) {}

  void run();

  const std::unique_ptr<KeyValueStore> store;
  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  std::deque<Task> tasks;
  bool is_busy = false;
  bool is_silent = false;  // a call got no answer, and none has got one since
  bool is_stopping = false;
};

void Work::run() {
  std::unique_lock lock(mutex);
  for (;;) {
    changed.wait(lock, [this] { return is_stopping || !tasks.empty(); });
    if (tasks.empty()) return;  // only after all pending writes
    is_busy = true;
    const Task task = std::move(tasks.front());
    tasks.pop_front();
    lock.unlock();
    (*task)();
    lock.lock();
    is_busy = is_silent = false;
    changed.notify_all();
  }
}

class LimitedStore final : public KeyValueStore {
 public:
  LimitedStore(std::unique_ptr<KeyValueStore> store, milliseconds limit)
      : limit_(limit), work_(std::make_shared<Work>(std::move(store))) {
    thread_ = std::thread([work = work_] { work->run(); });
    pthread_setname_np(thread_.native_handle(), "dp_store");
  }
  ~LimitedStore() override;

  void set(const std::string& key, const std::string& value) override {
    write([=](KeyValueStore& store) { store.set(key, value); });
  }
  void set_first(const std::string& key, const std::string& value) override {
    write([=](KeyValueStore& store) { store.set_first(key, value); });
  }
  void remove(const std::string& key) override {
    write([=](KeyValueStore& store) { store.remove(key); });
  }
  std::int64_t add(const std::string& key, std::int64_t amount) override {
    return write([=](KeyValueStore& store) { return store.add(key, amount); });
  }
  std::string get(const std::string& key) override {
    return read([=](KeyValueStore& store) { return store.get(key); });
  }
  bool has(const std::vector<std::string>& keys) override {
    return read([=](KeyValueStore& store) { return store.has(keys); });
  }

 private:
  template <typename Call>
  Answer<Call> read(Call call) {
    return answer_to(std::move(call), false);
  }
  template <typename Call>
  Answer<Call> write(Call call) {
    return answer_to(std::move(call), true);
  }
  template <typename Call>
  Answer<Call> answer_to(Call call, bool stays);
  [[nodiscard]] milliseconds give(const Task& task);
  [[noreturn]] void give_up(const Task& task, bool stays);

  const milliseconds limit_;
  const std::shared_ptr<Work> work_;
  std::thread thread_;
  const pid_t process_ = getpid();  // the one that has the thread
};

LimitedStore::~LimitedStore() {
  if (getpid() != process_) {
    new std::thread(std::move(thread_));
    new std::shared_ptr<Work>(work_);
    return;
  }
  std::unique_lock lock(work_->mutex);
  work_->is_stopping = true;
  work_->changed.notify_all();
  const milliseconds patience = work_->is_silent ? limit_ / kImpatience : limit_;
  const bool ends = work_->changed.wait_for(
      lock, patience, [this] { return !work_->is_busy && work_->tasks.empty(); });
  lock.unlock();
  ends ? thread_.join() : thread_.detach();
}

// The thread may run the call after this has thrown, so it must not reference the caller's frame.
template <typename Call>
Answer<Call> LimitedStore::answer_to(Call call, bool stays) {
  const auto promised = std::make_shared<std::packaged_task<Answer<Call>()>>(
      [call = std::move(call), store = work_->store.get()] { return call(*store); });
  std::future<Answer<Call>> answer = promised->get_future();
  const auto task = std::make_shared<std::function<void()>>([promised] { (*promised)(); });
  const milliseconds limit = give(task);
  if (answer.wait_for(limit) != std::future_status::ready) give_up(task, stays);
  return answer.get();
}

// Returns how long to wait for the answer.
milliseconds LimitedStore::give(const Task& task) {
  const std::lock_guard lock(work_->mutex);
  work_->tasks.push_back(task);
  work_->changed.notify_all();
  return work_->is_silent ? limit_ / kImpatience : limit_;
}

void LimitedStore::give_up(const Task& task, bool stays) {
  {
    const std::lock_guard lock(work_->mutex);
    if (!stays) std::erase(work_->tasks, task);
    work_->is_silent = work_->is_busy || !work_->tasks.empty();
  }
  throw NoAnswer(cat("the process group's store has not answered for ",
                     static_cast<double>(limit_.count()) / 1000,
                     " s; is the process stopped that hosts it (rank 0's, as a rule), or its "
                     "machine cut off?"));
}

}  // namespace

std::unique_ptr<KeyValueStore> limited_store(std::unique_ptr<KeyValueStore> store,
                                             milliseconds limit) {
  return std::make_unique<LimitedStore>(std::move(store), limit);
}

}  // namespace dualpipe
