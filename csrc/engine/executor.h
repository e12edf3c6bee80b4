#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "comm/transport.h"
#include "comm/watchdog.h"
#include "device/device.h"
#include "engine/program.h"
#include "engine/stage_runner.h"
#include "engine/trace.h"

namespace dualpipe {

// Runs one rank's program: a loop with one small function per kind of instruction. Computation
// waits only where it uses a message; nothing waits for a send. One thread at a time; Progress is
// read by the watchdog's thread.
class Executor final : public Progress {
 public:
  Executor(Transport& transport, Device& device) : transport_(transport), device_(device) {}

  struct Run {
    std::int64_t number = 0;  // StepInfo::step
    std::string name;         // for people: "step 3"
  };

  // Makes ready for a step: from now on others may ask for the progress. Program, runner and
  // reducer must outlive the step; these two may be null where the program has no use for them.
  void begin(const Program& program, Run run, StageRunner* runner, GradientReducer* reducer);

  // Instead of the step that was begun: meets the other ranks.
  void connect();

  // The step that was begun, commit included. Throws what computation or transport throw.
  // shapes: StepInfo::shapes.
  void run(std::uint64_t shapes);

  // Lets go of all messages: after a step that threw.
  void clear();

  // The clock of what stages compute on; without one there is the host's alone.
  void clock_with(StopwatchMaker stopwatches) { stopwatches_ = std::move(stopwatches); }
  // Whether the traces of the steps from now on are by that clock.
  void time_device(bool on) { times_device_ = on; }

  // Of the last step. Blocks until the device is done with it where blocks_on_trace().
  [[nodiscard]] const Trace& trace();
  [[nodiscard]] bool blocks_on_trace() const { return trace_.device_times != nullptr; }
  // Puts another trace in the place of the last one, which is returned.
  Trace replace_trace(Trace trace) { return std::exchange(trace_, std::move(trace)); }

  // The index of the instruction at work, or of the one that threw.
  [[nodiscard]] int cursor() const { return cursor_.load(std::memory_order_relaxed); }

  [[nodiscard]] std::chrono::nanoseconds waiting() const override;
  [[nodiscard]] std::string position() const override;

 private:
  void execute(const Instruction& instruction);
  void post_receive(const Instruction& instruction);
  void issue_send(const Instruction& instruction);
  void run_forward(const Instruction& instruction);
  void run_backward(const Instruction& instruction);
  void run_weight(const Instruction& instruction);
  void run_overlap(const Instruction& instruction);

  [[nodiscard]] Message take_input(const Computation& computation);
  void keep_result(const Computation& computation, Message result);
  void begin_computation();
  void end_computation(const Action& action);

  Transport& transport_;
  Device& device_;

  const Program* program_ = nullptr;
  StageRunner* runner_ = nullptr;
  GradientReducer* reducer_ = nullptr;
  std::vector<std::unique_ptr<PendingReceive>> receives_;  // by number
  std::vector<Message> slots_;
  Trace trace_;
  StopwatchMaker stopwatches_;
  bool times_device_ = false;
  std::shared_ptr<DeviceTimes> device_times_;  // of the step at work
  std::int64_t step_start_ns_ = 0;
  std::int64_t start_ns_ = 0;  // of the computation at work
  std::int64_t wait_ns_ = 0;   // of that

  Run run_;
  std::atomic<int> cursor_{0};
  std::atomic<int> awaited_{-1};                   // the last receive that computation waited for
  std::atomic<std::int64_t> waiting_since_ns_{0};  // 0: not waiting
  std::atomic<bool> has_begun_{false};             // the others have begun the step, too
};

}  // namespace dualpipe
