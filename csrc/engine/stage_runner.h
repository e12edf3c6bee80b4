#pragma once

#include <utility>

#include "common/ids.h"
#include "engine/weight_queue.h"
#include "memory/message.h"

namespace dualpipe {

// Does the computation: the torch bridge (csrc/torch), or plain C++ in tests. Called only by the
// executor's thread. An input is empty where the runner has the data itself (a first stage's
// inputs, a last stage's losses); a result is used only where another stage needs it.
class StageRunner {
 public:
  virtual ~StageRunner() = default;

  [[nodiscard]] virtual Message forward(Stage stage, Microbatch microbatch, Message input) = 0;

  // B computes all gradients. I (defer_weights) computes those of the inputs; those of the weights
  // are left to backward_weight().
  [[nodiscard]] virtual Message backward(Stage stage, Microbatch microbatch, Message output_grad,
                                         bool defer_weights) = 0;
  // advanced: to be called as gradients become final, see WeightQueue::run().
  virtual void backward_weight(Stage stage, Microbatch microbatch,
                               const WeightsAdvanced& advanced) = 0;

  // A forward and a backward in one piece; returns (activation, input gradient). Called only if the
  // program keeps its pairs.
  struct Half {
    Stage stage;
    Microbatch microbatch;
    Message input;
  };
  [[nodiscard]] virtual std::pair<Message, Message> overlapped(Half forward, Half backward) = 0;

  // The largest number of micro-batches, so far, that it has kept data of at the same time, for a
  // backward or for deferred weight gradients. A micro-batch counts once for each stage.
  [[nodiscard]] virtual int peak_live() const = 0;
};

// Sums gradients over the ranks that hold a copy of a stage.
class GradientReducer {
 public:
  virtual ~GradientReducer() = default;
  // Called during the last W of a stage: gradients that are not pending any more are final. Returns
  // at once.
  virtual void advance(Stage stage, const PendingWeights& pending) = 0;
  virtual void start(Stage stage) = 0;  // all its gradients are final; returns at once
  virtual void finish() = 0;            // when it returns, all that was started is summed
  virtual void cancel() noexcept = 0;   // after a failed step: forgets what was started
};

}  // namespace dualpipe
