#include "schedule/passes/passes.h"

namespace dualpipe {

Schedule serialize_overlap(Schedule schedule) {
  for (auto& row : schedule.rows) {
    std::vector<Action> out;
    out.reserve(row.size() * 2);
    for (const Action& action : row) {
      for_each_part(action, [&](const Action& part) { out.push_back(part); });
    }
    row = std::move(out);
  }
  return schedule;
}

}  // namespace dualpipe
