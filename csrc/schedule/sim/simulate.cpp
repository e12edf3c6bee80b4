#include "schedule/sim/simulate.h"

#include <algorithm>
#include <cmath>

#include "common/error.h"
#include "schedule/channel.h"
#include "schedule/passes/passes.h"
#include "schedule/verify/worklist.h"

namespace dualpipe {
namespace {

constexpr double kNever = -1;

// Every rank runs its row in order, every channel carries its messages in order: a message's
// arrival follows from its send alone, so ranks can be advanced in any order.
class Simulation {
 public:
  Simulation(const Schedule& schedule, const CostModel& costs)
      : schedule_(schedule),
        placement_(schedule.placement),
        costs_(costs),
        arrival_(num_messages(placement_), kNever),
        channel_free_(num_channels(placement_), 0),
        worklist_(placement_.num_ranks()) {
    timeline_.ranks.resize(schedule.rows.size());
  }

  Timeline run() {
    while (!worklist_.empty()) advance(worklist_.pop());
    for (std::size_t rank = 0; rank < schedule_.rows.size(); ++rank) check_end(rank);
    return std::move(timeline_);
  }

 private:
  void advance(Rank rank) {
    const auto& row = schedule_.row(rank);
    auto& spans = timeline_.ranks[rank.index()];
    while (spans.size() < row.size()) {
      const Action& action = row[spans.size()];
      const double inputs = inputs_at(action);
      if (inputs == kNever) return;
      const double start = std::max(inputs, spans.empty() ? 0.0 : spans.back().end);
      spans.push_back({action, start, start + duration(action)});
      timeline_.makespan = std::max(timeline_.makespan, spans.back().end);
      send(action, spans.back().end);
    }
  }

  [[nodiscard]] double inputs_at(const Action& action) const {
    double latest = 0;
    bool all = true;
    for_each_part(action, [&](const Action& part) {
      const auto input = input_of(placement_, part);
      if (!input) return;
      const double arrival = arrival_[message_index(placement_, *input)];
      all = all && arrival != kNever;
      latest = std::max(latest, arrival);
    });
    return all ? latest : kNever;
  }

  void send(const Action& action, double ready) {
    for_each_part(action, [&](const Action& part) {
      const auto output = output_of(placement_, part);
      if (!output) return;
      const Channel channel = channel_of(placement_, *output);
      double& arrival = arrival_[message_index(placement_, *output)];
      if (channel.source == channel.destination) {
        arrival = ready;
        return;
      }
      double& free = channel_free_[channel_index(placement_, channel)];
      free = std::max(free, ready) + costs_.message_time;
      arrival = free + costs_.latency;
      worklist_.push(channel.destination);
    });
  }

  [[nodiscard]] double duration(const Action& action) const {
    switch (action.op()) {
      case Op::kForward:
        return costs_.forward[action.stage()];
      case Op::kBackward:
        return costs_.backward_input[action.stage()] + costs_.backward_weight[action.stage()];
      case Op::kBackwardInput:
        return costs_.backward_input[action.stage()];
      case Op::kBackwardWeight:
        return costs_.backward_weight[action.stage()];
      case Op::kOverlap:
        return costs_.overlapped.value_or(duration(action.forward_half()) +
                                          duration(action.backward_half()));
      default:
        return 0;  // a reduction runs beside the computation
    }
  }

  void check_end(std::size_t rank) const {
    const std::size_t done = timeline_.ranks[rank].size();
    if (done == schedule_.rows[rank].size()) return;
    throw ScheduleError(cat("rank ", rank, ", step ", done, ": ",
                            to_string(schedule_.rows[rank][done]),
                            " waits for an input that never comes; verify the schedule first"));
  }

  const Schedule& schedule_;
  const Placement placement_;
  const CostModel costs_;
  std::vector<double> arrival_;       // by message
  std::vector<double> channel_free_;  // by channel
  Worklist worklist_;
  Timeline timeline_;
};

void check_computes(const Schedule& schedule) {
  for (const auto& row : schedule.rows) {
    for (const Action& action : row) {
      if (!is_send(action.op()) && !is_recv(action.op())) continue;
      throw ScheduleError(cat("\"", to_string(action),
                              "\" cannot be simulated; simulate a schedule of compute actions"));
    }
  }
}

void check_cost(const std::string& name, double value) {
  if (std::isfinite(value) && value >= 0) return;
  throw ScheduleError(cat(name, " is ", value, "; a duration is finite and at least 0"));
}

void check_stage_times(const char* name, const StageTimes& costs, int num_stages) {
  const std::vector<double>& times = costs.times();
  if (costs.differ() && times.size() != static_cast<std::size_t>(num_stages)) {
    throw ScheduleError(cat(name, " has ", times.size(), " durations for ", num_stages,
                            " stages; give one for each stage, or one for all"));
  }
  for (std::size_t s = 0; s < times.size(); ++s) {
    check_cost(costs.differ() ? cat(name, " of stage ", s) : name, times[s]);
  }
}

void check_costs(const CostModel& costs, int num_stages) {
  check_stage_times("forward", costs.forward, num_stages);
  check_stage_times("backward_input", costs.backward_input, num_stages);
  check_stage_times("backward_weight", costs.backward_weight, num_stages);
  check_cost("overlapped", costs.overlapped.value_or(0));
  check_cost("latency", costs.latency);
  check_cost("message_time", costs.message_time);
}

// The actions that the engine runs: simulated with late sends, they take the times that the
// original takes with early ones.
Schedule as_run(const Schedule& schedule, bool pairs_are_one_piece) {
  if (pairs_are_one_piece) return split_backward(schedule, false);
  return split_backward(serialize_overlap(schedule));
}

}  // namespace

double Timeline::busy(Rank rank) const {
  double total = 0;
  for (const Span& span : ranks.at(rank.index())) total += span.end - span.start;
  return total;
}

int Timeline::peak_activations(Rank rank) const {
  LiveActivations live;
  for (const Span& span : ranks.at(rank.index())) live.add(span.action);
  return live.peak();
}

Timeline simulate(const Schedule& schedule, const CostModel& costs, Sends sends) {
  check_costs(costs, schedule.num_stages());
  check_computes(schedule);
  if (sends == Sends::kLate) return Simulation(schedule, costs).run();
  const Schedule split = as_run(schedule, costs.overlapped.has_value());
  return Simulation(split, costs).run();
}

}  // namespace dualpipe
