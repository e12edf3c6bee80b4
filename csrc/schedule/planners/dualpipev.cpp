#include "schedule/planners/builtin.h"
#include "schedule/planners/dual_row.h"
#include "schedule/planners/sizes.h"

namespace dualpipe::planning {
namespace {

constexpr std::string_view kName = "dualpipev";

}  // namespace

// DualPipe cut in half: one direction, folded into a V of 2P stages. Phase 0 is its first leg,
// phase 1 its second.
Schedule dualpipev(const PlanRequest& request) {
  const int p = request.num_ranks;
  const int n = request.num_microbatches;
  require_basics(kName, request, 2);
  require(n >= 2 * p, kName, "num_microbatches", n,
          cat("it must be at least 2 * num_ranks = ", 2 * p));
  Schedule schedule = start(kName, Placement(PlacementKind::kV, p, 2 * p, n));
  for (int r = 0; r < p; ++r) {
    const DualShape shape{p, r, n - 2 * p + r + 1};
    schedule.rows[static_cast<std::size_t>(r)] =
        dual_row(shape, Phase{Stage(r), 0}, Phase{Stage(2 * p - 1 - r), 0});
  }
  return schedule;
}

}  // namespace dualpipe::planning
