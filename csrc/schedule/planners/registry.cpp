#include "common/error.h"
#include "schedule/planners/builtin.h"
#include "schedule/verify/verify.h"

namespace dualpipe {

const std::vector<PlannerInfo>& planners() {
  static const std::vector<PlannerInfo> kPlanners = {
      {"dualpipe", planning::dualpipe, PlacementKind::kBidirectional, 2,
       "bidirectional, forwards and backwards overlapped (DeepSeek-V3, arXiv 2412.19437)"},
      {"dualpipev", planning::dualpipev, PlacementKind::kV, 2,
       "DualPipe folded into a V: one copy of each stage (DeepSeek, DualPipe repository)"},
      {"1f1b", planning::one_f_one_b, PlacementKind::kLoop, 1,
       "one forward, one backward (PipeDream-Flush, arXiv 2006.09503)"},
      {"zb1p", planning::zb1p, PlacementKind::kLoop, 1,
       "1F1B with weight gradients deferred (ZB-H1, arXiv 2401.10241)"},
      {"zbv", planning::zbv, PlacementKind::kV, 2,
       "no idle rank between its first and last action where F = I = W (ZB-V, arXiv 2401.10241)"},
      {"gpipe", planning::gpipe, PlacementKind::kLoop, 1,
       "all forwards, then all backwards (GPipe, arXiv 1811.06965)"},
      {"interleaved_1f1b", planning::interleaved_1f1b, PlacementKind::kLoop, 0,
       "1F1B over several stages a rank (Megatron-LM, arXiv 2104.04473)"},
  };
  return kPlanners;
}

const PlannerInfo& find_planner(std::string_view name) {
  std::string known;
  for (const PlannerInfo& info : planners()) {
    if (info.name == name) return info;
    known += cat(known.empty() ? "" : ", ", info.name);
  }
  throw ScheduleError(cat("unknown schedule \"", name, "\"; use one of ", known,
                          ", or load one of your own from CSV"));
}

Schedule plan(std::string_view name, const PlanRequest& request) {
  Schedule schedule = find_planner(name).plan(request);
  throw_if_any(schedule, verify_compute(schedule));
  return schedule;
}

}  // namespace dualpipe
