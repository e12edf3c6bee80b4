#pragma once

#include <algorithm>
#include <string_view>

#include "common/error.h"
#include "schedule/planners/planners.h"

namespace dualpipe::planning {

// Throws a ScheduleError that says what was found, what is allowed and what to use instead.
inline void require(bool holds, std::string_view planner, std::string_view what, int value,
                    const std::string& allowed) {
  if (holds) return;
  throw ScheduleError(cat(planner, ": ", what, " is ", value, "; ", allowed));
}

// Requires sizes of at least 1 and the planner's own number of stages per rank.
inline void require_basics(std::string_view planner, const PlanRequest& request,
                           int stages_per_rank) {
  constexpr int kMaxRanks = 1 << 14;
  constexpr int kMaxMicrobatches = 1 << 20;
  require(request.num_ranks >= 1 && request.num_ranks <= kMaxRanks, planner, "num_ranks",
          request.num_ranks, cat("it must be in 1..", kMaxRanks));
  require(request.num_microbatches >= 1 && request.num_microbatches <= kMaxMicrobatches, planner,
          "num_microbatches", request.num_microbatches, cat("it must be in 1..", kMaxMicrobatches));
  require(request.stages_per_rank == 0 || request.stages_per_rank == stages_per_rank, planner,
          "stages_per_rank", request.stages_per_rank,
          cat("this schedule needs ", stages_per_rank, "; leave it out"));
}

// A schedule with an empty row for each rank.
inline Schedule start(std::string_view planner, const Placement& placement) {
  const auto num_ranks = static_cast<std::size_t>(placement.num_ranks());
  return Schedule{std::string(planner), placement, std::vector<std::vector<Action>>(num_ranks)};
}

}  // namespace dualpipe::planning
