#pragma once

#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "engine/stage_runner.h"
#include "engine/weight_queue.h"
#include "torch/grad_accumulation.h"
#include "torch/tensor_message.h"

namespace dualpipe {

// The user's side of a step: modules, criterion, hooks. Implementations that need the interpreter
// lock take it themselves.
class StageFunctions {
 public:
  virtual ~StageFunctions() = default;

  struct Result {
    Tensors outputs;  // empty at the last stage, which sends none
    at::Tensor loss;  // the last stage's scalar to differentiate; undefined elsewhere
  };
  // inputs is empty at the first stage, which has the step's own inputs.
  [[nodiscard]] virtual Result forward(Stage stage, Microbatch microbatch,
                                       const Tensors& inputs) = 0;

  struct Overlap {
    Stage forward_stage;
    Microbatch forward_microbatch;
    const Tensors& inputs;
    Stage backward_stage;
    Microbatch backward_microbatch;
    const at::Tensor& loss;       // defined at the last stage; then the two below are empty
    const Tensors& outputs;       // of the forward, with their graph; their memory may be gone
    const Tensors& output_grads;  // aligned with outputs
  };
  [[nodiscard]] virtual Result overlapped(const Overlap& work) = 0;

  // Calls work(), a backward or W, which may run code of the user's: hooks and backwards of their
  // own. What that raises may be thrown as another exception, to be read on all ranks.
  virtual void differentiate(const std::function<void()>& work) { work(); }
};

struct StageRunnerOptions {
  bool training = true;                  // false: keeps nothing for a backward
  bool keep_outputs = false;             // for overlapped(), which takes output tensors, not edges
  at::Device device = at::kCPU;          // of the stages
  at::Device message_device = at::kCPU;  // of what they exchange
  std::map<Stage, std::vector<GradTarget>> main_grads;  // parameters that have a main_grad
};

// Runs stages under torch's autograd. Between F and B it keeps the graph's edges, not the output
// tensors: a sent activation is freed as soon as it has left unless the graph itself needs it, and
// a stage may return a view.
class TorchStageRunner final : public StageRunner {
 public:
  TorchStageRunner(StageFunctions& functions, std::shared_ptr<WeightQueue> weight_queue,
                   StageRunnerOptions options);

  [[nodiscard]] Message forward(Stage stage, Microbatch microbatch, Message input) override;
  [[nodiscard]] Message backward(Stage stage, Microbatch microbatch, Message output_grad,
                                 bool defer_weights) override;
  void backward_weight(Stage stage, Microbatch microbatch,
                       const WeightsAdvanced& advanced) override;
  [[nodiscard]] std::pair<Message, Message> overlapped(Half forward, Half backward) override;
  [[nodiscard]] int peak_live() const override { return peak_live_; }

 private:
  // What a micro-batch needs for its backward.
  struct Live {
    Tensors inputs;
    std::vector<torch::autograd::Edge> roots;  // of the outputs; invalid where none is needed
    Tensors outputs;                           // only with keep_outputs
    at::Tensor loss;
  };

  [[nodiscard]] Message remember(Stage stage, Microbatch microbatch, Live live,
                                 StageFunctions::Result result);
  [[nodiscard]] const Live& recall(Stage stage, Microbatch microbatch) const;
  [[nodiscard]] Live forget(Stage stage, Microbatch microbatch);
  void run_autograd(const Live& live, const Tensors& output_grads) const;
  [[nodiscard]] Message input_grads(const Live& live) const;
  void fill_main_grads(Stage stage) const;

  StageFunctions& functions_;
  std::shared_ptr<WeightQueue> weight_queue_;
  StageRunnerOptions options_;
  std::map<std::pair<Stage, Microbatch>, Live> live_;  // until their backward
  int peak_live_ = 0;
};

}  // namespace dualpipe
