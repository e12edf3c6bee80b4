#include "schedule/planners/builtin.h"
#include "schedule/planners/dual_row.h"
#include "schedule/planners/sizes.h"

namespace dualpipe::planning {
namespace {

constexpr std::string_view kName = "dualpipe";

void check(const PlanRequest& request) {
  const int p = request.num_ranks;
  const int n = request.num_microbatches;
  require_basics(kName, request, 2);
  require(p % 2 == 0, kName, "num_ranks", p,
          cat("it must be even, for ranks r and P-1-r mirror each other: use ", p + 1));
  const int smallest = std::max(2 * p, n + n % 2);
  require(n % 2 == 0 && n >= 2 * p, kName, "num_microbatches", n,
          cat("it must be even and at least 2 * num_ranks = ", 2 * p, ": use ", smallest));
}

}  // namespace

// The bidirectional schedule of the DeepSeek-V3 report (arXiv 2412.19437, section 3.2.1). On the
// first half of the ranks phase 0 flows down and phase 1 up; on the second half it is the other way
// round.
Schedule dualpipe(const PlanRequest& request) {
  check(request);
  const int p = request.num_ranks;
  const int n = request.num_microbatches / 2;
  Schedule schedule =
      start(kName, Placement(PlacementKind::kBidirectional, p, p, request.num_microbatches));
  for (int r = 0; r < p; ++r) {
    const Phase down{Stage(r), 0};
    const Phase up{Stage(p - 1 - r), n};
    const int h = std::min(r, p - 1 - r);
    const DualShape shape{p / 2, h, n - p + h + 1};
    schedule.rows[static_cast<std::size_t>(r)] =
        r < p / 2 ? dual_row(shape, down, up) : dual_row(shape, up, down);
  }
  return schedule;
}

}  // namespace dualpipe::planning
