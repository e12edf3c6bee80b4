#pragma once

#include <memory>
#include <optional>
#include <string>

#include "comm/control_plane.h"
#include "comm/transport.h"
#include "comm/watchdog.h"
#include "device/device.h"
#include "engine/executor.h"
#include "engine/program.h"
#include "engine/stage_runner.h"
#include "engine/weight_queue.h"

namespace dualpipe {

// One rank of one pipeline: runs steps, and makes the failure of any rank the failure of all. Holds
// no global state; several can live in one process. One thread at a time.
class Engine {
 public:
  Engine(Rank rank, std::unique_ptr<Transport> transport, std::unique_ptr<ControlPlane> control,
         Watchdog::Options options, std::shared_ptr<Device> device = host_device());

  // Connects to the other ranks ahead of the first step, which then finds all connections made. All
  // ranks must call it, or none. Throws as run() does.
  void connect();

  // Runs a step on this rank; all ranks must call it. When it returns, the step is done on every
  // rank. When it throws, it throws on every rank, the engine is clean, and the next step works:
  //   what the runner threw   on the rank at fault
  //   PipelineError           elsewhere, and for dead ranks, broken links and time limits
  // shapes: StepInfo::shapes.
  void run(const Program& program, StageRunner& runner, GradientReducer* reducer,
           std::uint64_t shapes = 0);

  // A step without computation: its program consists of REDUCE_GRAD only. Same contract as run(),
  // but the trace remains that of the last run().
  void exchange(const Program& program, GradientReducer& reducer);

  // An empty step: returns when the devices of all ranks have finished their work. Same contract as
  // run(), which with messages in device memory may return before one of them fails.
  void synchronize();

  // Fails a step before it begins, for a mistake that perhaps only this rank made: the others must
  // not wait for it. is_step: the others are in a step, not in an exchange. Returns normally; the
  // caller raises its own error.
  void fail(const std::string& text, bool is_step = true) noexcept;

  // Makes num_steps + 1 the number of the next step.
  void resume_at(std::int64_t num_steps) { num_steps_ = num_steps; }

  [[nodiscard]] Rank rank() const { return rank_; }
  [[nodiscard]] Transport& transport() { return *transport_; }
  [[nodiscard]] Device& device() { return *device_; }
  [[nodiscard]] const std::shared_ptr<WeightQueue>& weight_queue() const { return weight_queue_; }
  // As in Executor.
  void clock_with(StopwatchMaker stopwatches) { executor_.clock_with(std::move(stopwatches)); }
  void time_device(bool on) { executor_.time_device(on); }
  [[nodiscard]] bool blocks_on_trace() const { return executor_.blocks_on_trace(); }
  [[nodiscard]] const Trace& trace() { return executor_.trace(); }
  // What this rank last reported to the others.
  [[nodiscard]] const std::string& failure() const { return failure_; }
  // Steps begun, including failed ones; exchanges do not count.
  [[nodiscard]] std::int64_t num_steps() const { return num_steps_; }
  // Where the last step stopped: an index into its program's instructions.
  [[nodiscard]] int cursor() const { return executor_.cursor(); }

 private:
  void run_guarded(std::string name, const Program& program, StageRunner* runner,
                   GradientReducer* reducer, std::uint64_t shapes);
  template <typename Work>
  void run_nothing(const char* description, const Work& work);
  template <typename Work>
  void guard(GradientReducer* reducer, const Work& work);
  // Called while an exception of the step is being handled.
  [[noreturn]] void raise_failure(GradientReducer* reducer);
  void report(const std::string& text) noexcept;
  void recover(GradientReducer* reducer) noexcept;
  [[nodiscard]] std::optional<Failure> await_report() noexcept;
  [[nodiscard]] std::string place() const;
  [[nodiscard]] std::string with_place(const std::string& text, const std::string& where) const;
  // How messages refer to a run that is not a step.
  [[nodiscard]] std::string between_steps() const;

  Rank rank_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<ControlPlane> control_;
  std::shared_ptr<Device> device_;
  std::shared_ptr<WeightQueue> weight_queue_ = std::make_shared<WeightQueue>();
  Executor executor_;
  std::int64_t num_runs_ = 0;  // steps and everything else that all ranks run together
  std::int64_t num_steps_ = 0;
  std::string failure_;
  std::optional<std::string> unrecovered_;  // why the transport could not recover
  std::unique_ptr<Watchdog> watchdog_;      // last: its thread uses the members above
};

}  // namespace dualpipe
