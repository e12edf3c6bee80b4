#pragma once

#include <string>
#include <vector>

#include "schedule/schedule.h"

namespace dualpipe {

struct Diagnostic {
  Rank rank;
  int step = -1;  // index into the rank's row; -1: the whole row
  std::string text;
};

// Proves that a schedule of compute actions is complete and in data order: every (stage,
// micro-batch) has one F and one B or I+W, none twice, each on the rank of the placement, and the
// order of computation has no cycle. Empty: proved.
[[nodiscard]] std::vector<Diagnostic> verify_compute(const Schedule& schedule);

// Proves a lowered schedule: the above; each channel sends and receives in one order; no deadlock
// when sends rendezvous and each channel is in-order; no receive buffer is refilled before its
// last use.
[[nodiscard]] std::vector<Diagnostic> verify_lowered(const Schedule& lowered);

// Throws ScheduleError with the first few diagnostics, if there are any.
void throw_if_any(const Schedule& schedule, const std::vector<Diagnostic>& diagnostics);

// Micro-batches whose activations a rank holds at once, at most (F to the end of B or I).
[[nodiscard]] int peak_live_activations(const Schedule& schedule, Rank rank);

}  // namespace dualpipe
