#include "schedule/planners/builtin.h"
#include "schedule/planners/sizes.h"

namespace dualpipe::planning {
namespace {

constexpr std::string_view kName = "gpipe";

}  // namespace

// GPipe (arXiv 1811.06965): all forwards, then all backwards.
Schedule gpipe(const PlanRequest& request) {
  require_basics(kName, request, 1);
  const int p = request.num_ranks;
  const int n = request.num_microbatches;
  Schedule schedule = start(kName, Placement(PlacementKind::kLoop, p, p, n));
  for (int r = 0; r < p; ++r) {
    auto& row = schedule.rows[static_cast<std::size_t>(r)];
    for (int i = 0; i < n; ++i) row.emplace_back(Op::kForward, Stage(r), Microbatch(i));
    for (int i = 0; i < n; ++i) row.emplace_back(Op::kBackward, Stage(r), Microbatch(i));
  }
  return schedule;
}

}  // namespace dualpipe::planning
