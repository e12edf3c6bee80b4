#include "streams.h"

#include <dlfcn.h>

#include <chrono>
#include <cstdlib>
#include <list>
#include <thread>
#include <utility>
#include <vector>

namespace simulated {
namespace {

constexpr int kDefaultQueues = 8;

thread_local bool is_in_kernel = false;

class WithoutPythonsLock {
 public:
  WithoutPythonsLock() {
    if (is_held_ != nullptr && is_held_() != 0) state_ = save_();
  }
  ~WithoutPythonsLock() {
    if (state_ != nullptr) restore_(state_);
  }
  WithoutPythonsLock(const WithoutPythonsLock&) = delete;
  WithoutPythonsLock& operator=(const WithoutPythonsLock&) = delete;

 private:
  template <class F>
  static F* find(const char* name) {
    return reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
  }

  inline static int (*const is_held_)() = find<int()>("PyGILState_Check");
  inline static void* (*const save_)() = find<void*()>("PyEval_SaveThread");
  inline static void (*const restore_)(void*) = find<void(void*)>("PyEval_RestoreThread");
  void* state_ = nullptr;
};

// Those of one priority.
struct Queues {
  std::deque<Queue> queues;
  std::atomic<std::size_t> next = 0;

  Queue& take() { return queues[next++ % queues.size()]; }
};

std::size_t num_connections() {
  const char* const wanted = std::getenv("CUDA_DEVICE_MAX_CONNECTIONS");
  return wanted != nullptr ? std::strtoul(wanted, nullptr, 10) : kDefaultQueues;
}

std::vector<Queues>& queues() {
  static auto* const made = [] {
    auto* const all = new std::vector<Queues>(1 - kHighestPriority);
    for (Queues& some : *all) some.queues.resize(num_connections());
    return all;
  }();
  return *made;
}

// The ends of all that was put last, of streams that are there or gone.
struct Ends {
  std::mutex mutex;
  std::list<PointPtr> points;
};

Ends& ends() {
  static auto* const all = new Ends;
  return *all;
}

void note(const PointPtr& end) {
  const std::lock_guard lock(ends().mutex);
  ends().points.remove_if([](const PointPtr& point) { return point->is_reached(); });
  ends().points.push_back(end);
}

}  // namespace

void Point::reach() {
  nanoseconds_ = std::chrono::steady_clock::now().time_since_epoch().count();
  reached_ = true;
  reached_.notify_all();
}

void Point::wait() const { reached_.wait(false); }

void Worker::put(Work work) {
  const std::lock_guard lock(mutex_);
  works_.push_back(std::move(work));
  if (!has_thread_) std::thread([this] { run(); }).detach();
  has_thread_ = true;
  changed_.notify_one();  // under the lock: after its last work the worker deletes itself
}

void Worker::run() {
  is_in_kernel = true;
  for (;;) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !works_.empty(); });
    const Work work = std::move(works_.front());
    works_.pop_front();
    lock.unlock();
    if (!work) break;
    work();
  }
  delete this;
}

void Worker::end() {
  if (has_thread_) return put(nullptr);
  delete this;
}

Stream::Stream(int priority) : queue_(queues().at(-priority).take()) {}

Stream::~Stream() {
  queue_.put([kernels = kernels_] { kernels->end(); });
}

PointPtr Stream::put_after(const PointPtr& point, Work work) {
  auto end = std::make_shared<Point>();
  note(end);
  const std::lock_guard lock(mutex_);
  queue_.put([before = std::exchange(last_, end), point, end, kernels = kernels_,
              work = std::move(work)]() mutable {
    if (before) before->wait();
    if (point) point->wait();
    kernels->put([end = std::move(end), work = std::move(work)] {
      work();
      end->reach();
    });
  });
  return end;
}

void Stream::put(Work work) { (void)put_after(nullptr, std::move(work)); }
void Stream::wait(const PointPtr& point) {
  (void)put_after(point, [] {});
}
PointPtr Stream::record() {
  return put_after(nullptr, [] {});
}

bool Stream::is_idle() {
  const std::lock_guard lock(mutex_);
  return last_ == nullptr || last_->is_reached();
}

Stream& stream_of(void* handle) {
  static auto* const by_default = new Stream(0);
  return handle == nullptr ? *by_default : *static_cast<Stream*>(handle);
}

void finish_all() {
  std::list<PointPtr> issued;
  {
    const std::lock_guard lock(ends().mutex);
    issued = ends().points;
  }
  for (const PointPtr& end : issued) wait_on_host(*end);
}

void after_all(Work work) {
  const auto wait_and_do = [work = std::move(work)] {
    finish_all();
    work();
  };
  is_in_kernel ? std::thread(wait_and_do).detach() : wait_and_do();
}

void wait_on_host(const Point& point) {
  if (point.is_reached()) return;
  const WithoutPythonsLock unlocked;
  point.wait();
}

}  // namespace simulated
