#include "engine/engine.h"

#include <thread>
#include <utility>

#include "common/error.h"

namespace dualpipe {
namespace {

// A broken link is usually the consequence of a failure elsewhere: how long to wait for the report
// of that failure.
constexpr std::chrono::milliseconds kReportPatience{1000};
constexpr std::chrono::milliseconds kReportPoll{10};

// Restores the trace at the end: users look at that of their last step, whatever was exchanged
// since.
class KeepsTrace {
 public:
  explicit KeepsTrace(Executor& executor)
      : executor_(executor), kept_(executor.replace_trace({})) {}
  ~KeepsTrace() { executor_.replace_trace(std::move(kept_)); }
  KeepsTrace(const KeepsTrace&) = delete;
  KeepsTrace& operator=(const KeepsTrace&) = delete;

 private:
  Executor& executor_;
  Trace kept_;
};

}  // namespace

Engine::Engine(Rank rank, std::unique_ptr<Transport> transport,
               std::unique_ptr<ControlPlane> control, Watchdog::Options options,
               std::shared_ptr<Device> device)
    : rank_(rank),
      transport_(std::move(transport)),
      control_(std::move(control)),
      device_(std::move(device)),
      executor_(*transport_, *device_),
      watchdog_(std::make_unique<Watchdog>(rank, *transport_, *control_, options)) {}

void Engine::run(const Program& program, StageRunner& runner, GradientReducer* reducer,
                 std::uint64_t shapes) {
  ++num_steps_;
  run_guarded(cat("step ", num_steps_), program, &runner, reducer, shapes);
}

void Engine::exchange(const Program& program, GradientReducer& reducer) {
  const KeepsTrace keeps_trace(executor_);
  run_guarded(between_steps(), program, nullptr, &reducer, 0);
}

void Engine::run_guarded(std::string name, const Program& program, StageRunner* runner,
                         GradientReducer* reducer, std::uint64_t shapes) {
  executor_.begin(program, {num_runs_ + 1, std::move(name)}, runner, reducer);
  guard(reducer, [&] {
    device_->begin();
    executor_.run(shapes);
  });
}

void Engine::connect() {
  run_nothing("the connection of the ranks", [this] { executor_.connect(); });
}

void Engine::synchronize() {
  run_nothing("synchronize(), which saving and loading call as well", [this] {
    if (const EventPtr computed = device_->compute().record()) computed->synchronize();
    executor_.run(0);
  });
}

template <typename Work>
void Engine::run_nothing(const char* description, const Work& work) {
  const KeepsTrace keeps_trace(executor_);
  const Program nothing = make_reduce_program(rank_, {}, description);
  executor_.begin(nothing, {num_runs_ + 1, between_steps()}, nullptr, nullptr);
  guard(nullptr, [&] {
    device_->begin();
    work();
  });
}

// Runs what all ranks run now, guarded by the watchdog; a failure on one rank becomes a failure on
// all.
template <typename Work>
void Engine::guard(GradientReducer* reducer, const Work& work) {
  ++num_runs_;
  watchdog_->arm(executor_, num_runs_);
  try {
    if (unrecovered_) throw PipelineError(cat("cannot go on after a failure: ", *unrecovered_));
    work();
    watchdog_->disarm();
  } catch (...) {
    watchdog_->disarm();
    raise_failure(reducer);
  }
}

void Engine::fail(const std::string& text, bool is_step) noexcept {
  watchdog_->disarm();
  ++num_runs_;
  if (is_step) ++num_steps_;
  const std::string name = is_step ? cat("step ", num_steps_) : between_steps();
  report(cat("rank ", rank_, ", ", name, ": ", text));
  recover(nullptr);
}

void Engine::raise_failure(GradientReducer* reducer) {
  const std::string where = place();
  try {
    throw;
  } catch (const PipelineError& error) {
    std::optional<Failure> failure = await_report();
    if (!failure.has_value()) {
      const std::string own = cat(where, ": ", error.what());
      report(own);
      recover(reducer);
      throw PipelineError(own);
    }
    transport_->abort(*failure);  // the reducer's threads may still be waiting
    recover(reducer);
    if (failure->rank == rank_) throw PipelineError(with_place(failure->text, where));
    throw PipelineError(cat(failure->text, "\n(noticed by ", where, ")"));
  } catch (const std::exception& error) {
    report(cat(where, ": ", error.what()));
    recover(reducer);
    throw;
  }
}

void Engine::report(const std::string& text) noexcept {
  failure_ = text;
  const Failure failure{.rank = rank_, .step = num_runs_, .text = text};
  try {
    control_->report(failure);
  } catch (const std::exception&) {
    // The control plane is gone: the other ranks will notice through their links.
  }
  transport_->abort(failure);
}

void Engine::recover(GradientReducer* reducer) noexcept {
  unrecovered_.reset();
  executor_.clear();
  weight_queue_->clear();
  if (reducer != nullptr) reducer->cancel();
  try {
    transport_->recover();
  } catch (const std::exception& error) {
    unrecovered_ = error.what();
  }
  control_->advance_epoch();  // in any case: this rank must report in the same epoch as the others
}

std::optional<Failure> Engine::await_report() noexcept {
  const auto deadline = std::chrono::steady_clock::now() + kReportPatience;
  while (std::chrono::steady_clock::now() < deadline) {
    try {
      if (auto failure = control_->poll(); failure.has_value()) return failure;
    } catch (const std::exception&) {
      return std::nullopt;
    }
    std::this_thread::sleep_for(kReportPoll);
  }
  return std::nullopt;
}

std::string Engine::with_place(const std::string& text, const std::string& where) const {
  const bool has_it = text.find(executor_.position()) != std::string::npos;
  return has_it ? text : cat(where, ": ", text);
}

std::string Engine::between_steps() const {
  return num_steps_ == 0 ? "before step 1" : cat("after step ", num_steps_);
}

std::string Engine::place() const { return cat("rank ", rank_, ", ", executor_.position()); }

}  // namespace dualpipe
