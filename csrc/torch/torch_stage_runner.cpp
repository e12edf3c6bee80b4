#include "torch/torch_stage_runner.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones_like.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <typeinfo>

#include "common/error.h"
#include "torch/deferred_linear.h"
#include "torch/no_autocast.h"

namespace dualpipe {
namespace {

namespace autograd = torch::autograd;

// Sets the mode of the weight queue for one backward pass.
class BackwardPass {
 public:
  BackwardPass(WeightQueue& queue, Stage stage, Microbatch microbatch, bool defer) : queue_(queue) {
    queue_.begin_backward(stage, microbatch, defer);
  }
  ~BackwardPass() { queue_.end_backward(); }
  BackwardPass(const BackwardPass&) = delete;
  BackwardPass& operator=(const BackwardPass&) = delete;

 private:
  WeightQueue& queue_;
};

// A tensor of the same shape and graph that occupies no memory.
at::Tensor hollow(const at::Tensor& tensor) {
  static double nothing = 0;
  const std::vector<std::int64_t> strides(static_cast<std::size_t>(tensor.dim()), 0);
  at::Tensor shell = at::from_blob(
      &nothing, tensor.sizes(), strides, [](void*) {}, tensor.options().device(at::kCPU));
  autograd::impl::set_gradient_edge(shell, autograd::impl::gradient_edge(tensor));
  return shell;
}

// Calls torch, and strips the C++ stack from its errors' what(), which every rank shows. Subclasses
// of c10::Error have Python types of their own and pass unchanged.
template <typename Function>
void without_stack(const Function& function) {
  try {
    function();
  } catch (const c10::Error& error) {
    if (typeid(error) != typeid(c10::Error)) throw;
    throw c10::Error(error.what_without_backtrace());
  }
}

}  // namespace

TorchStageRunner::TorchStageRunner(StageFunctions& functions,
                                   std::shared_ptr<WeightQueue> weight_queue,
                                   StageRunnerOptions options)
    : functions_(functions), weight_queue_(std::move(weight_queue)), options_(std::move(options)) {}

Message TorchStageRunner::forward(Stage stage, Microbatch microbatch, Message input) {
  const WeightQueueScope scope(weight_queue_);
  Live live;
  live.inputs = tensors_of(std::move(input), options_.device, options_.training);
  StageFunctions::Result result = functions_.forward(stage, microbatch, live.inputs);
  return remember(stage, microbatch, std::move(live), std::move(result));
}

Message TorchStageRunner::backward(Stage stage, Microbatch microbatch, Message output_grad,
                                   bool defer_weights) {
  const WeightQueueScope scope(weight_queue_);
  const Live live = forget(stage, microbatch);
  const Tensors output_grads = tensors_of(std::move(output_grad), options_.device, false);
  const BackwardPass pass(*weight_queue_, stage, microbatch, defer_weights);
  run_autograd(live, output_grads);
  fill_main_grads(stage);
  return input_grads(live);
}

void TorchStageRunner::backward_weight(Stage stage, Microbatch microbatch,
                                       const WeightsAdvanced& advanced) {
  const NoAutocast no_autocast;
  functions_.differentiate([&] {
    without_stack([&] { run_weight_gradients(*weight_queue_, stage, microbatch, advanced); });
  });
  fill_main_grads(stage);
}

std::pair<Message, Message> TorchStageRunner::overlapped(Half forward, Half backward) {
  const WeightQueueScope scope(weight_queue_);
  Live next;
  next.inputs = tensors_of(std::move(forward.input), options_.device, options_.training);
  const Live& live = recall(backward.stage, backward.microbatch);
  const Tensors output_grads = tensors_of(std::move(backward.input), options_.device, false);
  const BackwardPass pass(*weight_queue_, backward.stage, backward.microbatch, false);
  StageFunctions::Result result = functions_.overlapped({.forward_stage = forward.stage,
                                                         .forward_microbatch = forward.microbatch,
                                                         .inputs = next.inputs,
                                                         .backward_stage = backward.stage,
                                                         .backward_microbatch = backward.microbatch,
                                                         .loss = live.loss,
                                                         .outputs = live.outputs,
                                                         .output_grads = output_grads});
  fill_main_grads(backward.stage);
  Message activation =
      remember(forward.stage, forward.microbatch, std::move(next), std::move(result));
  const Live done = forget(backward.stage, backward.microbatch);
  return {std::move(activation), input_grads(done)};
}

Message TorchStageRunner::remember(Stage stage, Microbatch microbatch, Live live,
                                   StageFunctions::Result result) {
  if (options_.training) {
    live.loss = std::move(result.loss);
    for (const at::Tensor& output : result.outputs) {
      const bool needed = output.defined() && output.requires_grad();
      if (options_.keep_outputs) live.outputs.push_back(needed ? hollow(output) : at::Tensor());
      live.roots.push_back(needed ? autograd::impl::gradient_edge(output) : autograd::Edge());
    }
    live_[{stage, microbatch}] = std::move(live);
    const std::size_t num_live = live_.size() + weight_queue_->num_microbatches();
    peak_live_ = std::max(peak_live_, static_cast<int>(num_live));
  }
  return message_of(result.outputs, options_.message_device);
}

const TorchStageRunner::Live& TorchStageRunner::recall(Stage stage, Microbatch microbatch) const {
  const auto found = live_.find({stage, microbatch});
  DUALPIPE_CHECK(found != live_.end(), "no forward of stage ", stage, ", micro-batch ", microbatch);
  return found->second;
}

TorchStageRunner::Live TorchStageRunner::forget(Stage stage, Microbatch microbatch) {
  (void)recall(stage, microbatch);
  return std::move(live_.extract({stage, microbatch}).mapped());
}

// Autocast around a step is meant for its forwards. A backward runs in the types that they chose,
// as it does after autocast's scope has ended; autograd's threads would not even know the caller's
// type.
void TorchStageRunner::run_autograd(const Live& live, const Tensors& output_grads) const {
  autograd::edge_list roots;
  autograd::variable_list grads;
  if (live.loss.defined() && live.loss.requires_grad()) {
    roots.push_back(autograd::impl::gradient_edge(live.loss));
    grads.push_back(at::ones_like(live.loss));
  }
  for (std::size_t i = 0; i < output_grads.size(); ++i) {
    if (!output_grads[i].defined() || !live.roots[i].is_valid()) continue;
    roots.push_back(live.roots[i]);
    grads.push_back(output_grads[i]);
  }
  if (roots.empty()) return;
  const NoAutocast no_autocast;
  functions_.differentiate([&] {
    without_stack([&] {
      autograd::Engine::get_default_engine().execute(
          roots, grads, /*keep_graph=*/false, /*create_graph=*/false, /*accumulate_grad=*/true);
    });
  });
}

// Autograd knows only .grad. Called after every backward and W: summing micro-batches in .grad
// would round each sum.
void TorchStageRunner::fill_main_grads(Stage stage) const {
  const auto found = options_.main_grads.find(stage);
  if (found == options_.main_grads.end()) return;
  for (const GradTarget& target : found->second) move_to_main_grad(target);
}

Message TorchStageRunner::input_grads(const Live& live) const {
  Tensors grads;
  for (const at::Tensor& input : live.inputs) {
    grads.push_back(input.defined() ? input.grad() : at::Tensor());
  }
  return message_of(grads, options_.message_device);
}

}  // namespace dualpipe
