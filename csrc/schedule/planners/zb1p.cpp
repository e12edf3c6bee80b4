#include "schedule/planners/builtin.h"
#include "schedule/planners/sizes.h"

namespace dualpipe::planning {
namespace {

constexpr std::string_view kName = "zb1p";

// 1F1B with I in place of B. On rank r each W runs r micro-batches later: rank 0 cannot defer any
// without holding more than 1F1B does, rank P-1 defers most and fills the drain with them.
std::vector<Action> row_of(int rank, int num_ranks, int num_microbatches) {
  const Stage stage(rank);
  const int warm_up = std::min(num_microbatches, num_ranks - 1 - rank);
  std::vector<Action> row;
  for (int i = 0; i < num_microbatches + warm_up + rank; ++i) {
    const int input = i - warm_up;
    const int weight = input - rank;
    if (i < num_microbatches) row.emplace_back(Op::kForward, stage, Microbatch(i));
    if (input >= 0 && input < num_microbatches) {
      row.emplace_back(Op::kBackwardInput, stage, Microbatch(input));
    }
    if (weight >= 0) row.emplace_back(Op::kBackwardWeight, stage, Microbatch(weight));
  }
  return row;
}

}  // namespace

// ZB-H1 of "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241, section 2.2): the bubble of 1F1B
// minus one W for every hop, with the same memory.
Schedule zb1p(const PlanRequest& request) {
  require_basics(kName, request, 1);
  const int p = request.num_ranks;
  const int n = request.num_microbatches;
  Schedule schedule = start(kName, Placement(PlacementKind::kLoop, p, p, n));
  for (int r = 0; r < p; ++r) schedule.rows[static_cast<std::size_t>(r)] = row_of(r, p, n);
  return schedule;
}

}  // namespace dualpipe::planning
