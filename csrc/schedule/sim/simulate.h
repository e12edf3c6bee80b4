#pragma once

#include <optional>
#include <vector>

#include "schedule/schedule.h"

namespace dualpipe {

// Durations in any one unit of time.
struct CostModel {
  double forward = 1;
  double backward_input = 1;
  double backward_weight = 1;
  std::optional<double> overlapped;  // a whole F&B; none: F + I + W
  double latency = 0;                // of a message
  double message_time = 0;           // bytes over bandwidth: time a message occupies its channel
};

// kEarly: as the engine does: results leave before weights, and a pair waits for each input where
// it uses it. kLate: as published: pairs wait for both inputs and send at their end.
enum class Sends : std::uint8_t { kEarly, kLate };

struct Span {
  Action action;
  double start;
  double end;
};

// The same form as the engine's measured trace (engine/trace.h).
struct Timeline {
  std::vector<std::vector<Span>> ranks;  // compute spans, by rank, in order
  double makespan = 0;

  [[nodiscard]] double busy(Rank rank) const;
  [[nodiscard]] double bubble(Rank rank) const { return makespan - busy(rank); }
};

// Event-driven; schedule is one of compute actions alone (what a planner gives).
[[nodiscard]] Timeline simulate(const Schedule& schedule, const CostModel& costs, Sends sends);

}  // namespace dualpipe
