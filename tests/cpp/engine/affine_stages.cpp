#include "engine/affine_stages.h"

#include <algorithm>
#include <utility>

#include "common/error.h"

namespace dualpipe::testing {
namespace {

Number scale(Stage stage) { return static_cast<Number>(2 * stage.value() + 3); }
Number shift(Stage stage) { return static_cast<Number>(stage.value() + 1); }
Number input_of(Microbatch microbatch) { return static_cast<Number>(7 * microbatch.value() + 3); }

Results empty_results(const Placement& placement) {
  const auto num_microbatches = static_cast<std::size_t>(placement.num_microbatches());
  return {std::vector<Number>(num_microbatches), std::vector<Number>(num_microbatches),
          std::vector<Results::Parameters>(static_cast<std::size_t>(placement.num_stages()))};
}

// A message of the number and a None.
Message to_message(Number value) {
  auto owner = std::make_shared<Number>(value);
  TensorSpec spec;
  spec.dtype = 4;
  spec.num_bytes = sizeof(Number);
  return {{spec, TensorSpec()}, {reinterpret_cast<std::byte*>(owner.get()), nullptr}, owner};
}

Number from_message(const Message& message) {
  DUALPIPE_CHECK(message.num_tensors() == 2 && message.data[1] == nullptr,
                 "not a number: ", to_string(message.layout));
  return *reinterpret_cast<const Number*>(message.data[0]);
}

}  // namespace

Results unsplit(const Placement& placement, bool with_backward) {
  Results results = empty_results(placement);
  for (int i = 0; i < placement.num_microbatches(); ++i) {
    std::vector<Number> inputs;
    Number value = input_of(Microbatch(i));
    for (int s = 0; s < placement.num_stages(); ++s) {
      inputs.push_back(value);
      value = scale(Stage(s)) * value + shift(Stage(s));
    }
    results.outputs[static_cast<std::size_t>(i)] = value;
    if (!with_backward) continue;
    for (int s = placement.num_stages() - 1; s >= 0; --s) {
      auto& parameters = results.parameters[static_cast<std::size_t>(s)];
      parameters.scale += value * inputs[static_cast<std::size_t>(s)];
      parameters.shift += value;
      value *= scale(Stage(s));
    }
    results.input_grads[static_cast<std::size_t>(i)] = value;
  }
  return results;
}

AffineStages::AffineStages(const Placement& placement, std::shared_ptr<WeightQueue> queue)
    : placement_(placement), queue_(std::move(queue)) {
  clear();
}

void AffineStages::clear() {
  results_ = empty_results(placement_);
  saved_inputs_.assign(placement_.num_cells(), 0);
  handed_over_.clear();
  num_pairs_ = 0;
  num_live_ = 0;
  peak_live_ = 0;
}

Message AffineStages::forward(Stage stage, Microbatch microbatch, Message input) {
  before(Action(Op::kForward, stage, microbatch));
  const bool first = stage == placement_.first_stage();
  DUALPIPE_CHECK(first == (input.num_tensors() == 0), "stage ", stage, " got ", input.num_tensors(),
                 " tensors");
  const Number value = first ? input_of(microbatch) : from_message(input);
  saved_inputs_[placement_.cell(stage, microbatch)] = value;
  peak_live_ = std::max(peak_live_, ++num_live_);
  const Number output = scale(stage) * value + shift(stage);
  if (stage == placement_.last_stage()) results_.outputs[microbatch.index()] += output;
  return hand_over(output);
}

Message AffineStages::backward(Stage stage, Microbatch microbatch, Message output_grad,
                               bool defer_weights) {
  before(Action(defer_weights ? Op::kBackwardInput : Op::kBackward, stage, microbatch));
  const Number input = saved_inputs_[placement_.cell(stage, microbatch)];
  const bool last = stage == placement_.last_stage();
  const Number grad = last ? scale(stage) * input + shift(stage) : from_message(output_grad);
  auto& parameters = results_.parameters[stage.index()];
  const auto add_scale = [&parameters, grad, input] { parameters.scale += grad * input; };
  const auto add_shift = [&parameters, grad] { parameters.shift += grad; };
  queue_->begin_backward(stage, microbatch, defer_weights);
  if (queue_->deferring()) {
    queue_->put(add_scale, {&parameters.scale});
    queue_->put(add_shift, {&parameters.shift});
  } else {
    add_scale();
    add_shift();
    --num_live_;
  }
  queue_->end_backward();
  if (stage == placement_.first_stage()) {
    results_.input_grads[microbatch.index()] += grad * scale(stage);
  }
  return hand_over(grad * scale(stage));
}

void AffineStages::backward_weight(Stage stage, Microbatch microbatch,
                                   const WeightsAdvanced& advanced) {
  before(Action(Op::kBackwardWeight, stage, microbatch));
  queue_->run(stage, microbatch, advanced);
  --num_live_;
}

std::pair<Message, Message> AffineStages::overlapped(Half forward_half, Half backward_half) {
  ++num_pairs_;
  before(Action::overlap(forward_half.stage, forward_half.microbatch, Op::kBackward,
                         backward_half.stage, backward_half.microbatch));
  Message activation =
      forward(forward_half.stage, forward_half.microbatch, std::move(forward_half.input));
  Message input_grad = backward(backward_half.stage, backward_half.microbatch,
                                std::move(backward_half.input), false);
  return {std::move(activation), std::move(input_grad)};
}

Message AffineStages::hand_over(Number value) {
  Message message = to_message(value);
  handed_over_.push_back(message.owner);
  return message;
}

}  // namespace dualpipe::testing
