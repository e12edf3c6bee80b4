#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "engine/stage_runner.h"
#include "engine/weight_queue.h"
#include "schedule/action.h"
#include "schedule/placement.h"

namespace dualpipe::testing {

// Arithmetic modulo 2^64: exact, and sums do not depend on their order.
using Number = std::uint64_t;

// What a model of affine stages computes: stage s maps x to scale(s) * x + shift(s), and the loss
// of a micro-batch is half the square of the last stage's output.
struct Results {
  struct Parameters {
    Number scale = 0;
    Number shift = 0;
    bool operator==(const Parameters&) const = default;
  };
  std::vector<Number> outputs;         // of the last stage, by micro-batch
  std::vector<Number> input_grads;     // of the first stage, by micro-batch
  std::vector<Parameters> parameters;  // gradients, by stage
  bool operator==(const Results&) const = default;
};

// What the unsplit model computes, micro-batch by micro-batch.
[[nodiscard]] Results unsplit(const Placement& placement, bool with_backward = true);

// One rank's stages of that model, as plain C++. Not thread-safe.
class AffineStages final : public StageRunner {
 public:
  AffineStages(const Placement& placement, std::shared_ptr<WeightQueue> queue);

  Message forward(Stage stage, Microbatch microbatch, Message input) override;
  Message backward(Stage stage, Microbatch microbatch, Message output_grad,
                   bool defer_weights) override;
  void backward_weight(Stage stage, Microbatch microbatch,
                       const WeightsAdvanced& advanced) override;
  std::pair<Message, Message> overlapped(Half forward_half, Half backward_half) override;
  int peak_live() const override { return peak_live_; }

  // Called before each computation (for a pair: once for the pair, then for each half).
  std::function<void(const Action&)> before = [](const Action&) {};

  // This rank's share: zero where another rank computes.
  [[nodiscard]] const Results& results() const { return results_; }
  [[nodiscard]] int num_pairs() const { return num_pairs_; }
  // The bytes of what was handed over to the executor.
  [[nodiscard]] const std::vector<std::weak_ptr<void>>& handed_over() const { return handed_over_; }
  void clear();

 private:
  Message hand_over(Number value);

  Placement placement_;
  std::shared_ptr<WeightQueue> queue_;
  Results results_;
  std::vector<Number> saved_inputs_;  // by cell
  std::vector<std::weak_ptr<void>> handed_over_;
  int num_pairs_ = 0;
  int num_live_ = 0;
  int peak_live_ = 0;
};

}  // namespace dualpipe::testing
