#include "engine/executor.h"

#include "common/error.h"
#include "engine/device_times.h"

namespace dualpipe {

void Executor::begin(const Program& program, Run run, StageRunner* runner,
                     GradientReducer* reducer) {
  cursor_.store(0, std::memory_order_relaxed);
  awaited_.store(-1, std::memory_order_relaxed);
  waiting_since_ns_.store(0, std::memory_order_relaxed);
  has_begun_.store(false, std::memory_order_relaxed);
  program_ = &program;
  run_ = std::move(run);
  runner_ = runner;
  reducer_ = reducer;
  receives_.clear();
  receives_.resize(program.receives.size());
  slots_.clear();
  slots_.resize(static_cast<std::size_t>(program.num_slots));
  device_times_.reset();
  trace_ = Trace();
  trace_.events.reserve(program.instructions.size());
}

void Executor::run(std::uint64_t shapes) {
  step_start_ns_ = now_ns();
  if (times_device_ && stopwatches_) {
    device_times_ = std::make_shared<DeviceTimes>(stopwatches_());
  }
  waiting_since_ns_.store(step_start_ns_, std::memory_order_relaxed);
  transport_.begin_step({run_.number, program_->digest, program_->description, shapes});
  waiting_since_ns_.store(0, std::memory_order_relaxed);
  has_begun_.store(true, std::memory_order_relaxed);
  for (const Instruction& instruction : program_->instructions) {
    execute(instruction);
    cursor_.fetch_add(1, std::memory_order_relaxed);
  }
  awaited_.store(-1, std::memory_order_relaxed);
  waiting_since_ns_.store(now_ns(), std::memory_order_relaxed);
  if (reducer_ != nullptr) reducer_->finish();
  if (device_times_) device_times_->end_step();
  transport_.end_step();
  waiting_since_ns_.store(0, std::memory_order_relaxed);
  trace_.device_times = std::move(device_times_);
  trace_.peak_live_activations = runner_ != nullptr ? runner_->peak_live() : 0;
  trace_.duration_ns = now_ns() - step_start_ns_;
}

void Executor::connect() {
  waiting_since_ns_.store(now_ns(), std::memory_order_relaxed);
  transport_.connect();
  waiting_since_ns_.store(0, std::memory_order_relaxed);
}

void Executor::clear() {
  receives_.clear();
  slots_.clear();
  device_times_.reset();
}

const Trace& Executor::trace() {
  if (trace_.device_times) {
    trace_.device_times->write_to(trace_);
    trace_.device_times.reset();
  }
  return trace_;
}

void Executor::execute(const Instruction& instruction) {
  switch (instruction.action.op()) {
    case Op::kForward:
      return run_forward(instruction);
    case Op::kBackward:
    case Op::kBackwardInput:
      return run_backward(instruction);
    case Op::kBackwardWeight:
      return run_weight(instruction);
    case Op::kOverlap:
      return run_overlap(instruction);
    case Op::kSendForward:
    case Op::kSendBackward:
      return issue_send(instruction);
    case Op::kRecvForward:
    case Op::kRecvBackward:
      return post_receive(instruction);
    case Op::kReduceGrad:
      if (reducer_ != nullptr) reducer_->start(instruction.action.stage());
      return;
  }
}

void Executor::post_receive(const Instruction& instruction) {
  receives_[static_cast<std::size_t>(instruction.index)] =
      transport_.receive(instruction.peer, instruction.message);
}

void Executor::issue_send(const Instruction& instruction) {
  Message message = std::move(slots_[static_cast<std::size_t>(instruction.index)]);
  (void)transport_.send(instruction.peer, instruction.message, std::move(message),
                        device_.compute().record());
}

void Executor::run_forward(const Instruction& instruction) {
  begin_computation();
  const Action& action = instruction.action;
  Message input = take_input(instruction.first);
  keep_result(instruction.first,
              runner_->forward(action.stage(), action.microbatch(), std::move(input)));
  end_computation(action);
}

void Executor::run_backward(const Instruction& instruction) {
  begin_computation();
  const Action& action = instruction.action;
  const bool defer_weights = action.op() == Op::kBackwardInput;
  Message output_grad = take_input(instruction.first);
  keep_result(instruction.first, runner_->backward(action.stage(), action.microbatch(),
                                                   std::move(output_grad), defer_weights));
  end_computation(action);
}

void Executor::run_weight(const Instruction& instruction) {
  begin_computation();
  const Stage stage = instruction.action.stage();
  WeightsAdvanced advanced;
  if (instruction.is_last_weight && reducer_ != nullptr) {
    advanced = [this, stage](const PendingWeights& pending) { reducer_->advance(stage, pending); };
  }
  runner_->backward_weight(stage, instruction.action.microbatch(), advanced);
  end_computation(instruction.action);
}

void Executor::run_overlap(const Instruction& instruction) {
  begin_computation();
  const Action forward = instruction.action.forward_half();
  const Action backward = instruction.action.backward_half();
  Message input = take_input(instruction.first);
  Message output_grad = take_input(instruction.second);
  auto [activation, input_grad] =
      runner_->overlapped({forward.stage(), forward.microbatch(), std::move(input)},
                          {backward.stage(), backward.microbatch(), std::move(output_grad)});
  keep_result(instruction.first, std::move(activation));
  keep_result(instruction.second, std::move(input_grad));
  end_computation(instruction.action);
}

Message Executor::take_input(const Computation& computation) {
  const auto index = static_cast<std::size_t>(computation.index);
  switch (computation.source) {
    case Source::kRunner:
      return {};
    case Source::kSlot:
      return std::move(slots_[index]);
    case Source::kReceive:
      break;
  }
  const std::int64_t start = now_ns();
  awaited_.store(computation.index, std::memory_order_relaxed);
  waiting_since_ns_.store(start, std::memory_order_relaxed);
  Arrival arrival = receives_[index]->wait();
  waiting_since_ns_.store(0, std::memory_order_relaxed);
  receives_[index].reset();
  device_.compute().wait(arrival.ready);
  if (device_times_) device_times_->end_wait();
  wait_ns_ += now_ns() - start;
  return std::move(arrival.message);
}

void Executor::keep_result(const Computation& computation, Message result) {
  if (computation.result_slot < 0) return;
  slots_[static_cast<std::size_t>(computation.result_slot)] = std::move(result);
}

void Executor::begin_computation() {
  wait_ns_ = 0;
  start_ns_ = now_ns();
  if (device_times_) device_times_->begin_computation();
}

void Executor::end_computation(const Action& action) {
  if (device_times_) device_times_->end_computation();
  trace_.events.push_back(
      {action, start_ns_ - step_start_ns_, now_ns() - step_start_ns_, wait_ns_});
}

std::chrono::nanoseconds Executor::waiting() const {
  const std::int64_t since = waiting_since_ns_.load(std::memory_order_relaxed);
  return std::chrono::nanoseconds(since == 0 ? 0 : now_ns() - since);
}

std::string Executor::position() const {
  const bool is_waiting = waiting_since_ns_.load(std::memory_order_relaxed) != 0;
  if (is_waiting && !has_begun_.load(std::memory_order_relaxed)) {
    return cat(run_.name, ": waits for the other ranks to begin it");
  }
  const auto count = program_->instructions.size();
  const auto index = static_cast<std::size_t>(cursor());
  if (index >= count) return cat(run_.name, ": done, waits for the other ranks");
  const Instruction& instruction = program_->instructions[index];
  std::string text =
      cat(run_.name, ", action ", index + 1, " of ", count, ": ", to_string(instruction.action));
  const int awaited = awaited_.load(std::memory_order_relaxed);
  if (!is_waiting || awaited < 0) return text;
  const int receive = program_->receives[static_cast<std::size_t>(awaited)];
  const Instruction& source = program_->instructions[static_cast<std::size_t>(receive)];
  return cat(text, ", waits for the ", to_string(source.message), " from rank ", source.peer);
}

}  // namespace dualpipe
