#include "schedule/planners/builtin.h"
#include "schedule/planners/sizes.h"

namespace dualpipe::planning {
namespace {

constexpr std::string_view kName = "zbv";

// One rank's row: a counter for each operation on each leg of the V.
class Row {
 public:
  Row(Stage down, Stage up, int num_microbatches)
      : stages_{down, up}, num_microbatches_(num_microbatches) {}

  void forward(int leg) { add(Op::kForward, leg, forwards_[leg]); }
  void input(int leg) { add(Op::kBackwardInput, leg, inputs_[leg]); }
  void weight(int leg) { add(Op::kBackwardWeight, leg, weights_[leg]); }
  void input_and_weight(int leg) {
    input(leg);
    weight(leg);
  }
  [[nodiscard]] int num_forwards(int leg) const { return forwards_[leg]; }
  [[nodiscard]] bool owes_weights(int leg) const { return weights_[leg] < inputs_[leg]; }
  [[nodiscard]] std::vector<Action> take() { return std::move(row_); }

 private:
  // The order is meant for at least 2P-1 micro-batches; with fewer, the actions of the missing ones
  // are left out.
  void add(Op op, int leg, int& next) {
    if (next < num_microbatches_) row_.emplace_back(op, stages_[leg], Microbatch(next));
    ++next;
  }

  Stage stages_[2];
  int num_microbatches_;
  int forwards_[2] = {0, 0};
  int inputs_[2] = {0, 0};
  int weights_[2] = {0, 0};
  std::vector<Action> row_;
};

void warm_up(Row& row, int rank, int num_ranks) {
  for (int i = 0; i < 2 * (num_ranks - rank) - 1; ++i) row.forward(0);
  for (int i = 0; i < rank; ++i) {
    row.forward(1);
    row.forward(0);
  }
  for (int i = 0; i < num_ranks - rank; ++i) {
    row.forward(1);
    row.input_and_weight(1);
  }
}

void steady(Row& row, int num_microbatches) {
  while (row.num_forwards(1) < row.num_forwards(0) || row.num_forwards(0) < num_microbatches) {
    if (row.num_forwards(0) < num_microbatches) row.forward(0);
    row.input_and_weight(0);
    row.forward(1);
    row.input_and_weight(1);
  }
}

void cool_down(Row& row, int rank, int num_ranks) {
  for (int i = 0; i < rank; ++i) {
    row.input(0);
    row.input(1);
  }
  for (int i = 0; i < num_ranks - rank; ++i) row.input_and_weight(0);
  while (row.owes_weights(1)) row.weight(1);
  while (row.owes_weights(0)) row.weight(0);
}

}  // namespace

// ZB-V of "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241, section 6): if F = I = W, no rank
// idles between its first and its last action, with the memory of 1F1B.
Schedule zbv(const PlanRequest& request) {
  require_basics(kName, request, 2);
  const int p = request.num_ranks;
  const int n = request.num_microbatches;
  Schedule schedule = start(kName, Placement(PlacementKind::kV, p, 2 * p, n));
  for (int r = 0; r < p; ++r) {
    Row row(Stage(r), Stage(2 * p - 1 - r), n);
    warm_up(row, r, p);
    steady(row, std::max(2 * p - 1, n));
    cool_down(row, r, p);
    schedule.rows[static_cast<std::size_t>(r)] = row.take();
  }
  return schedule;
}

}  // namespace dualpipe::planning
