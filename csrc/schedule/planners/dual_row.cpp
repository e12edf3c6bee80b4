#include "schedule/planners/dual_row.h"

namespace dualpipe::planning {

DualRow::DualRow(Phase phase0, Phase phase1)
    : flows_{Flow{phase0.stage, phase0.first_microbatch, phase0.first_microbatch},
             Flow{phase1.stage, phase1.first_microbatch, phase1.first_microbatch}} {}

Action DualRow::next_forward(int phase) {
  Flow& flow = flows_[static_cast<std::size_t>(phase)];
  return Action(Op::kForward, flow.stage, Microbatch(flow.next_forward++));
}

Action DualRow::next_backward(int phase, Op op) {
  Flow& flow = flows_[static_cast<std::size_t>(phase)];
  return Action(op, flow.stage, Microbatch(flow.next_backward++));
}

void DualRow::forward(int phase) { row_.push_back(next_forward(phase)); }

void DualRow::backward(int phase) { row_.push_back(next_backward(phase, Op::kBackward)); }

void DualRow::backward_input(int phase) {
  const Action action = next_backward(phase, Op::kBackwardInput);
  row_.push_back(action);
  deferred_.emplace_back(Op::kBackwardWeight, action.stage(), action.microbatch());
}

void DualRow::weight() {
  row_.push_back(deferred_.front());
  deferred_.pop_front();
}

void DualRow::overlap(int forward_phase, int backward_phase) {
  const Action forward = next_forward(forward_phase);
  const Action backward = next_backward(backward_phase, Op::kBackward);
  row_.push_back(Action::overlap(forward.stage(), forward.microbatch(), backward.op(),
                                 backward.stage(), backward.microbatch()));
}

namespace {

// Steps 1 to 3: fill the pipeline.
void warm_up(DualRow& row, int to_turn, int h) {
  // Step 1: 2(H-h-1) times F0.
  for (int i = 0; i < 2 * to_turn; ++i) row.forward(0);
  // Step 2: h+1 times F0, F1.
  for (int i = 0; i < h + 1; ++i) {
    row.forward(0);
    row.forward(1);
  }
  // Step 3: H-h-1 times I1, W1, F1.
  for (int i = 0; i < to_turn; ++i) {
    row.backward_input(1);
    row.weight();
    row.forward(1);
  }
}

// Step 4: n-P+h+1 times F0&B1, F1&B0. At the turn of the pipeline the very first F0 and B1 run
// apart: B1 there waits for nobody, and its gradient should leave early.
void main_loop(DualRow& row, int iterations, bool at_turn) {
  for (int i = 0; i < iterations; ++i) {
    if (i == 0 && at_turn) {
      row.forward(0);
      row.backward(1);
    } else {
      row.overlap(0, 1);
    }
    row.overlap(1, 0);
  }
}

// Steps 5 to 8: drain it; weights fill the gaps.
void cool_down(DualRow& row, int to_turn, int h) {
  // Step 5: H-h-1 times B1, F1&B0.
  for (int i = 0; i < to_turn; ++i) {
    row.backward(1);
    row.overlap(1, 0);
  }
  // Step 6: h+1 times B1, B0; from iteration (h+1)//2 on, I instead of B: starting with that
  // iteration's B1 if h is odd, with its B0 if h is even.
  const int split_from = 2 * ((h + 1) / 2) + (h % 2 == 0 ? 1 : 0);
  for (int i = 0; i < 2 * (h + 1); ++i) {
    const int phase = i % 2 == 0 ? 1 : 0;
    if (i >= split_from) {
      row.backward_input(phase);
    } else {
      row.backward(phase);
    }
  }
  // Step 7: H-h-1 times W, I0.
  for (int i = 0; i < to_turn; ++i) {
    row.weight();
    row.backward_input(0);
  }
  // Step 8: h+1 times W.
  for (int i = 0; i < h + 1; ++i) row.weight();
}

}  // namespace

std::vector<Action> dual_row(const DualShape& shape, Phase phase0, Phase phase1) {
  const int to_turn = shape.half_ranks - shape.half_rank - 1;
  DualRow row(phase0, phase1);
  warm_up(row, to_turn, shape.half_rank);
  main_loop(row, shape.main_iterations, to_turn == 0);
  cool_down(row, to_turn, shape.half_rank);
  return row.take();
}

}  // namespace dualpipe::planning
