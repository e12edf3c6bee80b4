#pragma once

#include "schedule/planners/planners.h"

namespace dualpipe::planning {

[[nodiscard]] Schedule dualpipe(const PlanRequest& request);
[[nodiscard]] Schedule dualpipev(const PlanRequest& request);
[[nodiscard]] Schedule one_f_one_b(const PlanRequest& request);
[[nodiscard]] Schedule zb1p(const PlanRequest& request);
[[nodiscard]] Schedule zbv(const PlanRequest& request);
[[nodiscard]] Schedule gpipe(const PlanRequest& request);
[[nodiscard]] Schedule interleaved_1f1b(const PlanRequest& request);

}  // namespace dualpipe::planning
