#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <memory>

#include "engine/weight_queue.h"

namespace dualpipe {

// Makes a queue the current one: deferred_linear below a scope defers its weight gradients to it.
// Put one around a stage's forward and one around its backward. Belongs to the thread that made
// it, and reaches the autograd threads of backward passes begun there. Scopes nest.
class WeightQueueScope {
 public:
  explicit WeightQueueScope(std::shared_ptr<WeightQueue> queue);

 private:
  c10::DebugInfoGuard guard_;
};

// The queue of the innermost scope; nullptr outside of any.
[[nodiscard]] std::shared_ptr<WeightQueue> current_weight_queue();

// What a linear layer computes with. Its parameters are leaves; undefined tensors are absent.
struct LinearParameters {
  at::Tensor weight;            // [out, in], or [in, out] if transposed
  at::Tensor bias;              // [out]
  at::Tensor weight_main_grad;  // gradients are added here instead of to .grad
  at::Tensor bias_main_grad;
  bool transposed = false;
  bool sharded = false;  // they are DTensors, which hold their values in tensors of their own
};

// input [..., in] -> [..., out], bit-equal to at::linear (transposed: to at::addmm on flattened
// rows), under autocast as well. Under a scope its backward leaves the gradients of the parameters
// to the queue while that defers, and otherwise accumulates them at once; either way in place, and
// through autograd's engine where a parameter has hooks. Elsewhere it is the plain operation: so it
// is without gradients, and for parameters that are not leaves, or are of a subclass that holds its
// values elsewhere and are not said to be sharded.
// Cannot be differentiated twice. Call it and the tasks it queues without the interpreter lock.
[[nodiscard]] at::Tensor deferred_linear(const at::Tensor& input,
                                         const LinearParameters& parameters);

// WeightQueue::run for queues with tasks of deferred_linear: a parameter that is used several
// times in the micro-batch has its hooks called once, with the sum.
void run_weight_gradients(WeightQueue& queue, Stage stage, Microbatch microbatch,
                          const WeightsAdvanced& advanced = {});

}  // namespace dualpipe
