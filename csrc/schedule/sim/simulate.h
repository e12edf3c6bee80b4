#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "schedule/schedule.h"

namespace dualpipe {

// How long an action takes: the same on all stages, or a duration for each stage.
class StageTimes {
 public:
  StageTimes(double all) : times_{all} {}
  StageTimes(std::vector<double> by_stage) : times_(std::move(by_stage)), differ_(true) {}

  [[nodiscard]] double operator[](Stage stage) const { return times_[differ_ ? stage.index() : 0]; }
  [[nodiscard]] const std::vector<double>& times() const { return times_; }
  [[nodiscard]] bool differ() const { return differ_; }  // times() is by stage

 private:
  std::vector<double> times_;
  bool differ_ = false;
};

// Durations in any one unit of time.
struct CostModel {
  StageTimes forward = 1;
  StageTimes backward_input = 1;
  StageTimes backward_weight = 1;
  std::optional<double> overlapped = {};  // a whole F&B as one piece; none: the sum of its parts
  double latency = 0;                     // of a message
  double message_time = 0;  // bytes over bandwidth: time a message occupies its channel
};

// kEarly, as the engine does it: results leave before weights, and a pair of serial parts waits for
// each input where it uses it (a pair that is one piece stays one). kLate, as published: pairs wait
// for both inputs, and every backward sends at its end.
enum class Sends : std::uint8_t { kEarly, kLate };

struct Span {
  Action action;
  double start;
  double end;
};

// Of the same form as the engine's measured trace (engine/trace.h).
struct Timeline {
  std::vector<std::vector<Span>> ranks;  // compute spans, by rank, in order
  double makespan = 0;

  [[nodiscard]] double busy(Rank rank) const;
  [[nodiscard]] double bubble(Rank rank) const { return makespan - busy(rank); }
  [[nodiscard]] int peak_activations(Rank rank) const;
};

// Event-driven; schedule must have only compute actions (as from a planner). With kEarly the spans
// are those of the split actions that the engine runs. Throws ScheduleError on costs that are
// negative, not finite or for another number of stages, and on a schedule that cannot finish.
[[nodiscard]] Timeline simulate(const Schedule& schedule, const CostModel& costs, Sends sends);

// A line for each rank, a character for each `unit` of time: what runs when; bubbles are dots.
// Actions are drawn as 0F3, or all as F3 or F if some are too short for it. Throws ScheduleError on
// a unit that is not above 0, or so small that a line would be longer than 100,000 characters.
[[nodiscard]] std::string to_grid(const Timeline& timeline, double unit);

// The JSON of chrome://tracing and Perfetto: a thread for each rank. microseconds_per_unit turns
// the timeline's unit into the format's.
[[nodiscard]] std::string to_chrome_trace(const Timeline& timeline, double microseconds_per_unit);

}  // namespace dualpipe
