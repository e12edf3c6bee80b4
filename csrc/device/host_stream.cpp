#include "device/host_stream.h"

#include <pthread.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace dualpipe {

struct HostStream::State {
  void work();
  void run_one(std::unique_lock<std::mutex>& lock);

  std::mutex mutex;
  std::condition_variable work_cv;  // the worker waits for tasks
  std::condition_variable done_cv;  // synchronize() waits for tasks to be done
  std::deque<std::function<void()>> tasks;
  std::uint64_t num_enqueued = 0;
  std::uint64_t num_done = 0;  // run or dropped
  std::exception_ptr error;
  bool idle = false;  // the worker sleeps
  bool stopping = false;
  std::thread worker;
  const pid_t process = getpid();  // the one that has the worker
};

void HostStream::State::work() {
  std::unique_lock lock(mutex);
  while (true) {
    idle = tasks.empty() && !stopping;
    work_cv.wait(lock, [this] { return stopping || !tasks.empty(); });
    idle = false;
    if (stopping) return;
    run_one(lock);
  }
}

void HostStream::State::run_one(std::unique_lock<std::mutex>& lock) {
  std::function<void()> task = std::move(tasks.front());
  tasks.pop_front();
  const bool run = !error;
  lock.unlock();
  std::exception_ptr thrown;
  try {
    if (run) task();
  } catch (...) {
    thrown = std::current_exception();
  }
  task = nullptr;  // release what it holds before anyone sees that it is done
  lock.lock();
  if (thrown) error = std::move(thrown);
  ++num_done;
  done_cv.notify_all();
}

HostStream::HostStream(const char* name) : state_(std::make_unique<State>()) {
  state_->worker = std::thread([state = state_.get()] { state->work(); });
  pthread_setname_np(state_->worker.native_handle(), name);
}

HostStream::~HostStream() {
  if (getpid() != state_->process) {
    (void)state_.release();
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->work_cv.notify_one();
  state_->worker.join();
}

void HostStream::enqueue(std::function<void()> task) {
  bool wake = false;
  {
    const std::lock_guard lock(state_->mutex);
    state_->tasks.push_back(std::move(task));
    ++state_->num_enqueued;
    wake = std::exchange(state_->idle, false);
  }
  if (wake) state_->work_cv.notify_one();
}

void HostStream::synchronize() {
  std::unique_lock lock(state_->mutex);
  const std::uint64_t target = state_->num_enqueued;
  state_->done_cv.wait(lock, [&] { return state_->num_done >= target; });
  if (state_->error) std::rethrow_exception(std::exchange(state_->error, nullptr));
}

void HostStream::throw_if_failed() const {
  const std::lock_guard lock(state_->mutex);
  if (state_->error) std::rethrow_exception(state_->error);
}

}  // namespace dualpipe
