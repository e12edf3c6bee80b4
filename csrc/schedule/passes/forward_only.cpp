#include "schedule/passes/passes.h"

namespace dualpipe {
namespace {

bool is_forward(Op op) {
  return op == Op::kForward || op == Op::kSendForward || op == Op::kRecvForward;
}

}  // namespace

Schedule forward_only(Schedule schedule) {
  for (auto& row : schedule.rows) {
    std::vector<Action> out;
    for (const Action& action : row) {
      for_each_part(action, [&](const Action& part) {
        if (is_forward(part.op())) out.push_back(part);
      });
    }
    row = std::move(out);
  }
  return schedule;
}

}  // namespace dualpipe
