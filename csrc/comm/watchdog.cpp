#include "comm/watchdog.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "common/error.h"

namespace dualpipe {
namespace {

using Clock = std::chrono::steady_clock;

// Steps follow each other closely: while the thread keeps ticking between them, arm() need not wake
// it. After this many ticks without a step it sleeps until the next one.
constexpr int kTicksBeforeSleep = 10;

// A rank publishes where it is this many times per timeout, so that whoever times out first finds
// the positions of the others.
constexpr int kPositionsPerTimeout = 4;

std::string describe_timeout(Rank rank, std::chrono::milliseconds timeout,
                             const std::string& own_position,
                             const std::vector<std::string>& positions) {
  std::string text =
      cat("rank ", rank, " has waited longer than ", static_cast<double>(timeout.count()) / 1000,
          " s: ", own_position, "\npositions of all ranks:");
  for (std::size_t other = 0; other < positions.size(); ++other) {
    const std::string& known = other == rank.index() ? own_position : positions[other];
    text +=
        cat("\n  rank ", other, ": ",
            known.empty() ? "unknown (not in a step, gone, or ahead of its first report)" : known);
  }
  return text +
         "\nall ranks must call the same; where they are only slow, raise "
         "DualPipeConfig(timeout=...)";
}

}  // namespace

struct Watchdog::State {
  State(Rank rank_in, Transport& transport_in, ControlPlane& control_in, const Options& options_in)
      : rank(rank_in), transport(transport_in), control(control_in), options(options_in) {}

  void run();
  void tick(std::unique_lock<std::mutex>& lock);
  void look(std::unique_lock<std::mutex>& lock);
  void publish(std::unique_lock<std::mutex>& lock);
  void report_timeout(std::unique_lock<std::mutex>& lock);
  void report_fault(std::unique_lock<std::mutex>& lock, const std::string& text);
  void look_after_device(std::unique_lock<std::mutex>& lock);
  std::optional<Failure> poll_if_reachable() noexcept;
  void abort(const Failure& failure);
  bool still_in(std::uint64_t arming) const { return progress != nullptr && num_armings == arming; }
  bool timed_out() const {
    return options.timeout.count() > 0 && progress->waiting() > options.timeout;
  }

  const Rank rank;
  Transport& transport;
  ControlPlane& control;
  const Options options;

  std::mutex mutex;  // guards what follows; held while progress or the transport is used, never
                     // while the control plane is
  std::condition_variable cv;
  const Progress* progress = nullptr;  // null: not armed, or done with this step
  std::uint64_t num_armings = 0;
  std::int64_t step = 0;
  Clock::time_point next_position;
  int num_idle_ticks = kTicksBeforeSleep;
  bool asleep = false;
  bool stopping = false;
  std::thread thread;
  const pid_t process = getpid();  // the one that has the thread
};

void Watchdog::State::run() {
  std::unique_lock lock(mutex);
  while (!stopping) {
    if (progress == nullptr && num_idle_ticks >= kTicksBeforeSleep) {
      asleep = true;
      // The step may be over before this thread wakes up, while its device is still working.
      cv.wait(lock, [this, seen = num_armings] { return stopping || num_armings != seen; });
      asleep = false;
      num_idle_ticks = 0;
    }
    cv.wait_for(lock, options.poll_interval, [this] { return stopping; });
    if (stopping) return;
    tick(lock);
  }
}

void Watchdog::State::tick(std::unique_lock<std::mutex>& lock) {
  const bool armed = progress != nullptr;
  const std::uint64_t arming = num_armings;
  try {
    if (!armed && !transport.busy()) {
      ++num_idle_ticks;
      return;
    }
    num_idle_ticks = 0;
    armed ? look(lock) : look_after_device(lock);
  } catch (const std::exception& error) {
    if (!lock.owns_lock()) lock.lock();
    if (num_armings != arming || (armed && progress == nullptr)) return;
    abort(
        {rank, step,
         cat("rank ", rank, armed ? " cannot reach the other ranks any more: " : " cannot go on: ",
             error.what())});
  }
}

// Checks once for failures elsewhere and for a wait of this rank that takes too long.
void Watchdog::State::look(std::unique_lock<std::mutex>& lock) {
  if (options.interrupted()) {
    return report_fault(lock, cat("rank ", rank, " was interrupted (Ctrl-C)"));
  }
  const std::uint64_t arming = num_armings;
  lock.unlock();
  const std::optional<Failure> failure = control.poll();
  lock.lock();
  if (!still_in(arming)) return;
  if (failure && failure->step <= step) {
    abort(*failure);
  } else if (const auto fault = transport.fault()) {
    report_fault(lock, *fault);
  } else if (timed_out()) {
    report_timeout(lock);
  } else if (options.timeout.count() > 0 && Clock::now() >= next_position) {
    publish(lock);
  }
}

// The host has finished the step; the device may still wait for a rank that is gone.
void Watchdog::State::look_after_device(std::unique_lock<std::mutex>& lock) {
  if (const auto fault = transport.fault()) return report_fault(lock, *fault);
  const std::uint64_t arming = num_armings;
  lock.unlock();
  const std::optional<Failure> failure = poll_if_reachable();
  lock.lock();
  if (failure && num_armings == arming && failure->step <= step) transport.abort(*failure);
}

// Ignores a store that is gone with its host rank: that rank may have finished, and so may all.
std::optional<Failure> Watchdog::State::poll_if_reachable() noexcept try {
  return control.poll();
} catch (const std::exception&) {
  return std::nullopt;
}

void Watchdog::State::report_fault(std::unique_lock<std::mutex>& lock, const std::string& text) {
  const std::uint64_t arming = num_armings;
  const Failure own{rank, step, text};
  lock.unlock();
  try {
    control.report(own);
  } catch (const std::exception&) {
    // The other ranks will notice through their links.
  }
  lock.lock();
  if (num_armings == arming) abort(own);
}

void Watchdog::State::publish(std::unique_lock<std::mutex>& lock) {
  next_position = Clock::now() + options.timeout / kPositionsPerTimeout;
  const std::string position = progress->position();
  lock.unlock();
  control.publish_position(position);
  lock.lock();
}

void Watchdog::State::report_timeout(std::unique_lock<std::mutex>& lock) {
  const std::uint64_t arming = num_armings;
  const std::int64_t failed_step = step;
  const std::string position = progress->position();
  lock.unlock();
  control.publish_position(position);
  lock.lock();
  // Gives others that began to wait at about the same time a chance to publish, too.
  cv.wait_for(lock, 2 * options.poll_interval, [this] { return stopping; });
  if (!still_in(arming) || !timed_out()) return;
  lock.unlock();
  const Failure own{rank, failed_step,
                    describe_timeout(rank, options.timeout, position, control.positions())};
  control.report(own);
  const std::optional<Failure> first = control.poll();
  lock.lock();
  if (!still_in(arming)) return;
  if (!first || first->step <= failed_step) {
    abort(first.value_or(own));
  } else if (timed_out()) {
    abort(own);  // a report of a later step came first and displaced this one
  }
}

void Watchdog::State::abort(const Failure& failure) {
  transport.abort(failure);
  progress = nullptr;
}

Watchdog::Watchdog(Rank rank, Transport& transport, ControlPlane& control, Options options)
    : state_(std::make_unique<State>(rank, transport, control, options)) {
  state_->thread = std::thread([state = state_.get()] { state->run(); });
  pthread_setname_np(state_->thread.native_handle(), "dp_watchdog");
}

Watchdog::~Watchdog() {
  if (getpid() != state_->process) {
    (void)state_.release();
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->cv.notify_one();
  state_->thread.join();
}

void Watchdog::arm(const Progress& progress, std::int64_t step) {
  bool wake = false;
  {
    const std::lock_guard lock(state_->mutex);
    state_->progress = &progress;
    state_->num_idle_ticks = 0;
    ++state_->num_armings;
    state_->step = step;
    state_->next_position = Clock::now() + state_->options.timeout / kPositionsPerTimeout;
    wake = state_->asleep;
  }
  if (wake) state_->cv.notify_one();
}

void Watchdog::disarm() {
  const std::lock_guard lock(state_->mutex);
  state_->progress = nullptr;
  ++state_->num_armings;  // what is still found about this step must not end a later one
}

}  // namespace dualpipe
