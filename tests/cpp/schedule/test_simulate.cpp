#include <cmath>

#include "helpers.h"
#include "schedule/sim/simulate.h"

namespace dualpipe {
namespace {

using test::expect_error;
using test::make;

constexpr auto kLoop = PlacementKind::kLoop;

// The bubble, which must be the same on every rank.
double bubble(const Schedule& schedule, const CostModel& costs, Sends sends) {
  const Timeline timeline = simulate(schedule, costs, sends);
  const double first = timeline.bubble(Rank(0));
  for (int r = 1; r < schedule.num_ranks(); ++r) {
    EXPECT_DOUBLE_EQ(timeline.bubble(Rank(r)), first) << "rank " << r;
  }
  return first;
}

// (PP/2-1)(F&B + B - 3W) with late sends, (PP/2-1)F with early ones; PP: number of stages.
TEST(Simulate, DualPipeBubblesAreThePublishedOnesAndHalfOfThem) {
  for (int half : {1, 2, 4, 8}) {
    const Schedule both = plan("dualpipe", {2 * half, 4 * half + 4, 0});
    EXPECT_DOUBLE_EQ(bubble(both, {}, Sends::kLate), (half - 1) * 2);
    EXPECT_DOUBLE_EQ(bubble(both, {}, Sends::kEarly), half - 1);
    const Schedule v = plan("dualpipev", {half, 4 * half + 4, 0});
    EXPECT_DOUBLE_EQ(bubble(v, {}, Sends::kLate), (half - 1) * 2);
    EXPECT_DOUBLE_EQ(bubble(v, {}, Sends::kEarly), half - 1);
  }
}

// Ranks differ in how many pairs they run, so a faster pair makes their bubbles differ: the formula
// is that of the middle ranks, which run most.
TEST(Simulate, DualPipeBubbleFollowsTheFormulaForOtherCosts) {
  for (int half : {2, 4, 8}) {
    const Schedule schedule = plan("dualpipe", {2 * half, 8 * half, 0});
    for (double overlapped : {3.0, 2.75, 2.5}) {
      const Timeline timeline = simulate(schedule, {.overlapped = overlapped}, Sends::kLate);
      EXPECT_DOUBLE_EQ(timeline.bubble(Rank(half)), (half - 1) * (overlapped + 2 - 3));
      EXPECT_DOUBLE_EQ(timeline.bubble(Rank(half - 1)), (half - 1) * (overlapped + 2 - 3));
    }
  }
}

TEST(Simulate, OneFOneBBubbleFollowsTheFormula) {
  for (int p : {2, 4, 8}) {
    const Schedule schedule = plan("1f1b", {p, 3 * p, 0});
    for (const CostModel& costs :
         {CostModel{}, CostModel{.forward = 2, .backward_input = 3, .backward_weight = 1}}) {
      const double f = costs.forward[Stage(0)];
      const double b = costs.backward_input[Stage(0)] + costs.backward_weight[Stage(0)];
      EXPECT_DOUBLE_EQ(bubble(schedule, costs, Sends::kLate), (p - 1) * (f + b));
    }
  }
}

TEST(Simulate, Zb1pBubbleFollowsTheFormula) {
  for (int p : {2, 4, 8}) {
    const Schedule schedule = plan("zb1p", {p, 3 * p, 0});
    for (Sends sends : {Sends::kLate, Sends::kEarly}) {
      EXPECT_DOUBLE_EQ(bubble(schedule, {}, sends), p - 1);
      EXPECT_DOUBLE_EQ(bubble(schedule, {.backward_input = 2}, sends), 2 * (p - 1));
    }
  }
}

TEST(Simulate, ZbvLeavesOnlyTheSkewOfTheRanks) {
  const Schedule schedule = plan("zbv", {4, 12, 0});
  const Timeline timeline = simulate(schedule, {}, Sends::kLate);
  for (int r = 0; r < 4; ++r) {
    const auto& spans = timeline.ranks[static_cast<std::size_t>(r)];
    EXPECT_DOUBLE_EQ(spans.back().end - spans.front().start, timeline.busy(Rank(r)));
  }
}

TEST(Simulate, EarlyIsNeverSlowerThanLate) {
  test::for_each_plan(8, [](const Schedule& schedule) {
    const CostModel costs{.forward = 2, .backward_input = 3, .backward_weight = 1, .latency = 0.5};
    EXPECT_LE(simulate(schedule, costs, Sends::kEarly).makespan,
              simulate(schedule, costs, Sends::kLate).makespan)
        << schedule.name;
  });
}

TEST(Simulate, AddsLatencyToEveryHop) {
  const Schedule schedule = make(kLoop, 2, {"0F0 0B0", "1F0 1B0"});
  const CostModel costs{.latency = 10};
  EXPECT_DOUBLE_EQ(simulate(schedule, costs, Sends::kLate).makespan, 1 + 10 + 1 + 2 + 10 + 2);
  EXPECT_DOUBLE_EQ(simulate(schedule, costs, Sends::kEarly).makespan, 1 + 10 + 1 + 1 + 10 + 2);
}

// Messages of one channel follow each other: the second waits for the link.
TEST(Simulate, AMessageOccupiesItsChannel) {
  const Schedule schedule = make(kLoop, 2, {"0F0 0F1", "1F0 1F1"});
  const Timeline timeline = simulate(schedule, {.message_time = 5}, Sends::kLate);
  EXPECT_DOUBLE_EQ(timeline.ranks[1][0].start, 1 + 5);
  EXPECT_DOUBLE_EQ(timeline.ranks[1][1].start, 1 + 5 + 5);
}

// With early sends, stage 0 need not wait for stage 1's W.
TEST(Simulate, StagesMayTakeDifferentTimes) {
  const Schedule schedule = make(kLoop, 2, {"0F0 0B0", "1F0 1B0"});
  const CostModel costs{.forward = std::vector<double>{1, 2},
                        .backward_input = std::vector<double>{5, 3},
                        .backward_weight = std::vector<double>{0.5, 1}};
  EXPECT_DOUBLE_EQ(simulate(schedule, costs, Sends::kLate).makespan, 1 + 2 + (3 + 1) + (5 + 0.5));
  EXPECT_DOUBLE_EQ(simulate(schedule, costs, Sends::kEarly).makespan, 1 + 2 + 3 + (5 + 0.5));
}

// Each half of a pair takes the time of its own stage.
TEST(Simulate, HalvesOfAPairAreOfDifferentStages) {
  const Schedule schedule =
      make(PlacementKind::kV, 2, {"0F0 1F0 (0F1;1B0)OVERLAP_F_B 1F1 0B0 1B1 0B1"});
  const CostModel costs{.forward = std::vector<double>{1, 10}, .backward_weight = 0};
  const Timeline timeline = simulate(schedule, costs, Sends::kLate);
  EXPECT_DOUBLE_EQ(timeline.ranks[0][2].end - timeline.ranks[0][2].start, 1 + 1);
  EXPECT_DOUBLE_EQ(timeline.makespan, 2 * (1 + 10) + 4);
}

TEST(Simulate, EarlySpansAreWhatTheEngineRuns) {
  const Schedule schedule = make(kLoop, 2, {"0F0 0F1 0B0 0B1", "1F0 (1F1;1B0)OVERLAP_F_B 1B1"});
  const auto texts = [&](const CostModel& costs, Sends sends) {
    std::string out;
    const Timeline timeline = simulate(schedule, costs, sends);
    for (const Span& span : timeline.ranks[1]) {
      out += to_string(span.action) + " ";
    }
    return out;
  };
  EXPECT_EQ(texts({}, Sends::kEarly), "1F0 1F1 1I0 1W0 1I1 1W1 ");
  EXPECT_EQ(texts({}, Sends::kLate), "1F0 (1F1;1B0)OVERLAP_F_B 1B1 ");
  EXPECT_EQ(texts({.overlapped = 2.5}, Sends::kEarly), "1F0 (1F1;1B0)OVERLAP_F_B 1I1 1W1 ");
}

TEST(Simulate, CountsActivationsAndTimeOfEachRank) {
  const Timeline timeline = simulate(plan("dualpipe", {4, 8, 0}), {}, Sends::kEarly);
  for (int r = 0; r < 4; ++r) {
    EXPECT_EQ(timeline.peak_activations(Rank(r)), 5);
    EXPECT_DOUBLE_EQ(timeline.busy(Rank(r)), 3 * 8);
  }
  EXPECT_DOUBLE_EQ(timeline.makespan, 25);
}

TEST(Simulate, RefusesNonsense) {
  const Schedule schedule = make(kLoop, 2, {"0F0 0B0", "1F0 1B0"});
  const auto run = [&](const CostModel& costs) {
    return [=] { (void)simulate(schedule, costs, Sends::kLate); };
  };
  expect_error<ScheduleError>(run({.forward = -1}), {"forward is -1"});
  expect_error<ScheduleError>(run({.overlapped = -2}), {"overlapped is -2"});
  expect_error<ScheduleError>(run({.latency = std::nan("")}), {"latency", "finite"});
  expect_error<ScheduleError>(run({.forward = std::vector<double>{1, 2, 3}}),
                              {"forward has 3 durations for 2 stages"});
  expect_error<ScheduleError>(run({.backward_input = std::vector<double>{}}),
                              {"backward_input has 0 durations"});
  expect_error<ScheduleError>(run({.backward_weight = std::vector<double>{1, -1}}),
                              {"backward_weight of stage 1 is -1"});
  const Schedule cycle = make(kLoop, 2, {"0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"});
  expect_error<ScheduleError>([&] { (void)simulate(cycle, {}, Sends::kLate); },
                              {"rank 0, step 1: 0B0", "verify"});
  const Schedule lowered = lower(schedule, {});
  expect_error<ScheduleError>([&] { (void)simulate(lowered, {}, Sends::kLate); },
                              {"0RECV_B0", "compute actions"});
}

TEST(ChromeTrace, HasAThreadForEachRankAndAnEventForEachSpan) {
  const Schedule schedule = make(kLoop, 2, {"0F0 0B0", "1F0 1B0"});
  EXPECT_EQ(to_chrome_trace(simulate(schedule, {}, Sends::kLate), 1000),
            R"({"traceEvents":[
{"ph":"M","name":"thread_name","pid":0,"tid":0,"args":{"name":"rank 0"}},
{"ph":"X","name":"0F0","cat":"forward","pid":0,"tid":0,"ts":0,"dur":1000},
{"ph":"X","name":"0B0","cat":"backward","pid":0,"tid":0,"ts":4000,"dur":2000},
{"ph":"M","name":"thread_name","pid":0,"tid":1,"args":{"name":"rank 1"}},
{"ph":"X","name":"1F0","cat":"forward","pid":0,"tid":1,"ts":1000,"dur":1000},
{"ph":"X","name":"1B0","cat":"backward","pid":0,"tid":1,"ts":2000,"dur":2000}
],"displayTimeUnit":"ms"}
)");
}

}  // namespace
}  // namespace dualpipe
