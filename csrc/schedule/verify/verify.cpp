#include "schedule/verify/verify.h"

#include "common/error.h"
#include "schedule/grid.h"
#include "schedule/verify/findings.h"
#include "schedule/verify/progress.h"
#include "schedule/verify/row_order.h"

namespace dualpipe {
namespace {

constexpr std::size_t kShown = 5;

void check_rows(const Schedule& schedule, Form form, Findings& findings) {
  RowOrder order(schedule, form, findings);
  order.check_rows();
  if (!findings.full()) order.check_complete();
}

std::string place(const Diagnostic& diagnostic) {
  if (diagnostic.step < 0) return cat("rank ", diagnostic.rank);
  return cat("rank ", diagnostic.rank, ", step ", diagnostic.step);
}

}  // namespace

// Each check relies on the ones before it, so the proof ends at the first that finds something.
std::vector<Diagnostic> verify_compute(const Schedule& schedule) {
  Findings findings;
  check_rows(schedule, Form::kCompute, findings);
  if (findings.empty()) check_compute_progress(schedule, findings);
  return findings.take();
}

std::vector<Diagnostic> verify_lowered(const Schedule& lowered) {
  Findings findings;
  check_rows(lowered, Form::kLowered, findings);
  if (findings.empty()) check_channel_order(lowered, findings);
  if (findings.empty()) check_message_progress(lowered, findings);
  return findings.take();
}

std::vector<Diagnostic> verify(const Schedule& schedule) {
  for (const auto& row : schedule.rows) {
    for (const Action& action : row) {
      if (is_send(action.op()) || is_recv(action.op())) return verify_lowered(schedule);
    }
  }
  return verify_compute(schedule);
}

void throw_if_any(const Schedule& schedule, const std::vector<Diagnostic>& diagnostics) {
  if (diagnostics.empty()) return;
  std::string text = cat("schedule \"", schedule.name, "\" (", schedule.num_ranks(), " ranks, ",
                         schedule.num_microbatches(), " micro-batches) does not hold:");
  for (std::size_t i = 0; i < diagnostics.size() && i < kShown; ++i) {
    text += cat("\n  ", place(diagnostics[i]), ": ", diagnostics[i].text);
  }
  if (diagnostics.size() > kShown) text += cat("\n  and ", diagnostics.size() - kShown, " more");
  const Diagnostic& first = diagnostics.front();
  if (first.rank.valid() && first.rank.index() < schedule.rows.size()) {
    text += cat("\n", to_grid(schedule, around(schedule, first.rank, first.step)));
  }
  throw ScheduleError(text);
}

int peak_live_activations(const Schedule& schedule, Rank rank) {
  LiveActivations live;
  for (const Action& action : schedule.row(rank)) live.add(action);
  return live.peak();
}

}  // namespace dualpipe
