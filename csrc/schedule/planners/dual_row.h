#pragma once

#include <array>
#include <deque>
#include <vector>

#include "schedule/action.h"

namespace dualpipe::planning {

// One of the two flows through a rank: its stage and its first micro-batch.
struct Phase {
  Stage stage;
  int first_microbatch;
};

// Writes one rank's row of a schedule with two phases: each action takes the phase's next
// micro-batch, and weights deferred by an I are taken first in, first out.
class DualRow {
 public:
  DualRow(Phase phase0, Phase phase1);

  void forward(int phase);
  void backward(int phase);
  void backward_input(int phase);
  void weight();
  void overlap(int forward_phase, int backward_phase);

  [[nodiscard]] std::vector<Action> take() { return std::move(row_); }

 private:
  struct Flow {
    Stage stage;
    int next_forward;
    int next_backward;
  };
  Action next_forward(int phase);
  Action next_backward(int phase, Op op);

  std::array<Flow, 2> flows_;
  std::deque<Action> deferred_;
  std::vector<Action> row_;
};

// A rank's place in the published order (design: DualPipe, DeepSeek-V3 report, section 3.2.1).
struct DualShape {
  int half_ranks;       // H: ranks from an entry of the pipeline to its turn
  int half_rank;        // h: distance of this rank from the entry
  int main_iterations;  // length of step 4
};

// Steps 1 to 8 of the published order, the same for DualPipe and DualPipeV.
[[nodiscard]] std::vector<Action> dual_row(const DualShape& shape, Phase phase0, Phase phase1);

}  // namespace dualpipe::planning
