#include "schedule/planners/builtin.h"
#include "schedule/planners/sizes.h"

namespace dualpipe::planning {
namespace {

constexpr std::string_view kName = "1f1b";

std::vector<Action> row_of(int rank, int num_ranks, int num_microbatches) {
  const Stage stage(rank);
  const int warm_up = std::min(num_microbatches, num_ranks - 1 - rank);
  std::vector<Action> row;
  for (int i = 0; i < num_microbatches + warm_up; ++i) {
    if (i < num_microbatches) row.emplace_back(Op::kForward, stage, Microbatch(i));
    if (i >= warm_up) row.emplace_back(Op::kBackward, stage, Microbatch(i - warm_up));
  }
  return row;
}

}  // namespace

// PipeDream-Flush (arXiv 2006.09503): rank r runs P-1-r forwards ahead, then one forward and one
// backward in turn. At most P-r micro-batches live on rank r.
Schedule one_f_one_b(const PlanRequest& request) {
  require_basics(kName, request, 1);
  const int p = request.num_ranks;
  const int n = request.num_microbatches;
  Schedule schedule = start(kName, Placement(PlacementKind::kLoop, p, p, n));
  for (int r = 0; r < p; ++r) schedule.rows[static_cast<std::size_t>(r)] = row_of(r, p, n);
  return schedule;
}

}  // namespace dualpipe::planning
