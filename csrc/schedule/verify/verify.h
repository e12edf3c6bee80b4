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
// order of computation has no cycle. A schedule without any backward is for inference: each has one
// F. Returns no diagnostics if proved, otherwise at most kMaxDiagnostics.
[[nodiscard]] std::vector<Diagnostic> verify_compute(const Schedule& schedule);

// Proves a lowered schedule: the above; each channel sends and receives in one order; and there
// is no deadlock when sends rendezvous and each channel is in-order.
//
// The model of the proof. A rank computes in the order of its row. A SEND or RECV is posted when
// all compute actions before it are done, and never blocks its rank. Message i of a channel is
// complete when its send and its receive are both posted and message i-1 is complete. A compute
// action waits for the messages it uses.
[[nodiscard]] std::vector<Diagnostic> verify_lowered(const Schedule& lowered);

// verify_lowered for a schedule with messages, verify_compute for one without.
[[nodiscard]] std::vector<Diagnostic> verify(const Schedule& schedule);

inline constexpr std::size_t kMaxDiagnostics = 64;

// If there are diagnostics, throws ScheduleError with the first few and the actions around the
// first.
void throw_if_any(const Schedule& schedule, const std::vector<Diagnostic>& diagnostics);

// The most micro-batches whose activations a rank holds at once (from F to the end of B or W).
[[nodiscard]] int peak_live_activations(const Schedule& schedule, Rank rank);

}  // namespace dualpipe
