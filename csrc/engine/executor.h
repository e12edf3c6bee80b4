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

  // Prepares a step; from now on other threads may query its progress. Program, runner and reducer
  // must outlive the step; the latter two may be null if the program does not need them.
  void begin(const Program& program, Run run, StageRunner* runner, GradientReducer* reducer);

  // Connects to the other ranks, in place of running the step that was prepared.
  void connect();

  // Runs the step that was prepared, including its commit. Throws whatever the computation or the
  // transport throws. shapes: StepInfo::shapes.
  void run(std::uint64_t shapes);

  // Releases all messages. For use after a step that threw.
  void clear();

  // Sets the clock of the device that stages compute on; without one there is only the host's.
  void clock_with(StopwatchMaker stopwatches) { stopwatches_ = std::move(stopwatches); }
  // Whether traces of later steps use that clock.
  void time_device(bool on) { times_device_ = on; }

  // The trace of the last step. If blocks_on_trace(), blocks until the device has finished the
  // step.
  [[nodiscard]] const Trace& trace();
  [[nodiscard]] bool blocks_on_trace() const { return trace_.device_times != nullptr; }
  // Replaces the last trace and returns it.
  Trace replace_trace(Trace trace) { return std::exchange(trace_, std::move(trace)); }

  // The index of the current instruction, or of the one that threw.
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
  std::shared_ptr<DeviceTimes> device_times_;  // of the current step
  std::int64_t step_start_ns_ = 0;
  std::int64_t start_ns_ = 0;  // of the current computation
  std::int64_t wait_ns_ = 0;   // its waits for messages

  Run run_;
  std::atomic<int> cursor_{0};
  std::atomic<int> awaited_{-1};                   // the last receive that computation waited for
  std::atomic<std::int64_t> waiting_since_ns_{0};  // 0: not waiting
  std::atomic<bool> has_begun_{false};             // begin_step() has returned
};

}  // namespace dualpipe
