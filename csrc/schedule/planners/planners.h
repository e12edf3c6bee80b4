#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "schedule/schedule.h"

namespace dualpipe {

struct PlanRequest {
  int num_ranks = 0;
  int num_microbatches = 0;
  int stages_per_rank = 0;  // 0: what the planner needs; interleaved_1f1b takes any (default 2)
};

// A planner returns only compute actions, and throws ScheduleError on sizes it cannot serve.
using Planner = Schedule (*)(const PlanRequest&);

struct PlannerInfo {
  std::string_view name;
  Planner plan;
  PlacementKind placement;
  int stages_per_rank;       // 0: any
  std::string_view summary;  // one line, with the source
};

// All built-in planners, in the order in which the documentation lists them.
[[nodiscard]] const std::vector<PlannerInfo>& planners();

// Throws ScheduleError, which lists the known names, on an unknown name.
[[nodiscard]] const PlannerInfo& find_planner(std::string_view name);

// find_planner(name).plan(request), then verified.
[[nodiscard]] Schedule plan(std::string_view name, const PlanRequest& request);

}  // namespace dualpipe
