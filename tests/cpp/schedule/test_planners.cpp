#include <algorithm>
#include <array>
#include <ostream>

#include "helpers.h"

namespace dualpipe {
namespace {

using test::expect_error;
using test::text_of;

TEST(Planners, EveryPlanIsProved) {
  test::for_each_plan(16, [](const Schedule& schedule) {
    EXPECT_EQ(test::joined(verify_compute(schedule)), "")
        << schedule.name << " P=" << schedule.num_ranks() << " N=" << schedule.num_microbatches();
  });
}

// F, F&B, B, I, W of a rank.
std::array<int, 5> counts(const Schedule& schedule, int rank) {
  std::array<int, 5> out{};
  for (const Action& action : schedule.row(Rank(rank))) {
    switch (action.op()) {
      case Op::kForward:
        ++out[0];
        break;
      case Op::kOverlap:
        ++out[1];
        break;
      case Op::kBackward:
        ++out[2];
        break;
      case Op::kBackwardInput:
        ++out[3];
        break;
      default:
        ++out[4];
    }
  }
  return out;
}

struct Row {
  int num_ranks;
  int num_microbatches;
  int rank;
  std::array<int, 5> counts;
};

std::ostream& operator<<(std::ostream& out, const Row& row) {
  return out << "P" << row.num_ranks << "_N" << row.num_microbatches << "_rank" << row.rank;
}

class DualPipeCounts : public ::testing::TestWithParam<Row> {};

TEST_P(DualPipeCounts, AreThoseOfThePublishedOrder) {
  const Row& row = GetParam();
  const Schedule schedule = plan("dualpipe", {row.num_ranks, row.num_microbatches, 0});
  EXPECT_EQ(counts(schedule, row.rank), row.counts);
  EXPECT_EQ(counts(schedule, row.num_ranks - 1 - row.rank), row.counts);
}

INSTANTIATE_TEST_SUITE_P(
    Table, DualPipeCounts,
    ::testing::Values(Row{2, 4, 0, {3, 1, 2, 1, 1}}, Row{4, 8, 0, {5, 3, 2, 3, 3}},
                      Row{4, 8, 1, {5, 3, 3, 2, 2}}, Row{8, 20, 0, {11, 9, 4, 7, 7}},
                      Row{8, 20, 1, {10, 10, 4, 6, 6}}, Row{8, 20, 2, {9, 11, 4, 5, 5}},
                      Row{8, 20, 3, {9, 11, 5, 4, 4}}),
    ::testing::PrintToStringParamName());

TEST(DualPipe, ForwardsAndBackwardsAddUp) {
  for (int p = 2; p <= 16; p += 2) {
    for (int n = 2 * p; n <= 4 * p; n += 2) {
      const Schedule schedule = plan("dualpipe", {p, n, 0});
      for (int r = 0; r < p; ++r) {
        const auto [f, fb, b, i, w] = counts(schedule, r);
        EXPECT_EQ(f + fb, n);
        EXPECT_EQ(b + i + fb, n);
        EXPECT_EQ(i, w);
      }
    }
  }
}

TEST(DualPipe, HoldsOneMicrobatchMoreThanRanksEverywhere) {
  for (int p = 2; p <= 16; p += 2) {
    for (int n = 2 * p; n <= 4 * p; n += 2) {
      const Schedule schedule = plan("dualpipe", {p, n, 0});
      for (int r = 0; r < p; ++r) EXPECT_EQ(peak_live_activations(schedule, Rank(r)), p + 1);
    }
  }
}

TEST(DualPipe, FollowsTheStepsOfTheTable) {
  const Schedule schedule = plan("dualpipe", {4, 8, 0});
  EXPECT_EQ(text_of(schedule, 0),
            "0F0 0F1 0F2 3F4 3I4 3W4 3F5 (0F3;3B5)OVERLAP_F_B (3F6;0B0)OVERLAP_F_B 3B6 "
            "(3F7;0B1)OVERLAP_F_B 3B7 0I2 0W2 0I3 0W3");
  EXPECT_EQ(text_of(schedule, 1),
            "1F0 2F4 1F1 2F5 1F2 2B4 (2F6;1B0)OVERLAP_F_B (1F3;2B5)OVERLAP_F_B "
            "(2F7;1B1)OVERLAP_F_B 2B6 1B2 2I7 1I3 2W7 1W3");
}

TEST(DualPipe, MirroredRanksDoTheSameWithTheOtherHalf) {
  const Schedule schedule = plan("dualpipe", {8, 20, 0});
  const auto mirrored = [](const Action& part) {
    return Action(part.op(), part.stage(), Microbatch((part.microbatch().value() + 10) % 20));
  };
  for (int r = 0; r < 8; ++r) {
    const auto& own = schedule.row(Rank(r));
    const auto& other = schedule.row(Rank(7 - r));
    ASSERT_EQ(own.size(), other.size());
    for (std::size_t step = 0; step < own.size(); ++step) {
      std::vector<Action> left;
      std::vector<Action> right;
      for_each_part(own[step], [&](const Action& part) { left.push_back(part); });
      for_each_part(other[step], [&](const Action& part) { right.push_back(mirrored(part)); });
      EXPECT_EQ(left, right);
    }
  }
}

// So the gradients of the upper stage are summed while the lower one is computed.
TEST(DualPipe, EndsWithTheLowerStageOfEachRank) {
  for (const int p : {2, 4, 8}) {
    const Schedule schedule = plan("dualpipe", {p, 2 * p, 0});
    for (int r = 0; r < p; ++r) {
      EXPECT_EQ(schedule.row(Rank(r)).back().stage(), Stage(std::min(r, p - 1 - r)));
    }
  }
}

TEST(DualPipeV, HoldsOneMicrobatchMoreThanStagesEverywhere) {
  for (int p = 1; p <= 8; ++p) {
    const Schedule schedule = plan("dualpipev", {p, 4 * p, 0});
    for (int r = 0; r < p; ++r) EXPECT_EQ(peak_live_activations(schedule, Rank(r)), 2 * p + 1);
  }
}

TEST(OneFOneB, HoldsAMicrobatchForEachRankAhead) {
  const Schedule schedule = plan("1f1b", {4, 8, 0});
  EXPECT_EQ(text_of(schedule, 2),
            "2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7");
  for (int r = 0; r < 4; ++r) EXPECT_EQ(peak_live_activations(schedule, Rank(r)), 4 - r);
}

TEST(OneFOneB, ServesFewerMicrobatchesThanRanks) {
  EXPECT_EQ(text_of(plan("1f1b", {4, 2, 0}), 0), "0F0 0F1 0B0 0B1");
}

TEST(Zb1p, DefersTheWeightsOfRankRByRMicrobatches) {
  const Schedule schedule = plan("zb1p", {3, 4, 0});
  EXPECT_EQ(text_of(schedule, 0), "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3");
  EXPECT_EQ(text_of(schedule, 2), "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3");
}

// As many as on rank 0 of 1F1B: the W that I defers needs the layers' inputs.
TEST(Zb1p, HoldsAMicrobatchForEachRankEverywhere) {
  const Schedule schedule = plan("zb1p", {8, 32, 0});
  for (int r = 0; r < 8; ++r) EXPECT_EQ(peak_live_activations(schedule, Rank(r)), 8);
}

TEST(Gpipe, RunsAllForwardsFirst) {
  EXPECT_EQ(text_of(plan("gpipe", {2, 2, 0}), 1), "1F0 1F1 1B0 1B1");
}

TEST(Interleaved, VisitsItsStagesInRounds) {
  EXPECT_EQ(text_of(plan("interleaved_1f1b", {2, 4, 2}), 1),
            "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3");
}

TEST(Planners, RefuseSizesWithValueLimitAndRemedy) {
  const auto make = [](const char* name, int p, int n, int stages = 0) {
    return [=] { (void)plan(name, {p, n, stages}); };
  };
  expect_error<ScheduleError>(make("dualpipe", 3, 8), {"num_ranks is 3", "even", "use 4"});
  expect_error<ScheduleError>(make("dualpipe", 4, 9), {"is 9", "even", "use 10"});
  expect_error<ScheduleError>(make("dualpipe", 4, 6), {"is 6", "2 * num_ranks = 8", "use 8"});
  expect_error<ScheduleError>(make("dualpipev", 4, 7), {"is 7", "2 * num_ranks = 8"});
  expect_error<ScheduleError>(make("interleaved_1f1b", 4, 11), {"is 11", "use 8 or 12"});
  expect_error<ScheduleError>(make("interleaved_1f1b", 4, 8, 65), {"stages_per_rank is 65"});
  expect_error<ScheduleError>(make("interleaved_1f1b", 0, 8), {"num_ranks is 0"});
  expect_error<ScheduleError>(make("1f1b", 4, 8, 2), {"stages_per_rank is 2", "needs 1"});
  expect_error<ScheduleError>(make("1f1b", 0, 8), {"num_ranks is 0"});
  expect_error<ScheduleError>(make("gpipe", 2, 0), {"num_microbatches is 0"});
  expect_error<ScheduleError>(make("zbv", 2'000'000'000, 8), {"num_ranks is 2000000000"});
  expect_error<ScheduleError>(make("2f2b", 4, 8), {"\"2f2b\"", "dualpipe, dualpipev, 1f1b", "CSV"});
}

TEST(Planners, AreListedOnceEach) {
  std::vector<std::string_view> names;
  for (const PlannerInfo& info : planners()) {
    names.push_back(info.name);
    EXPECT_EQ(&find_planner(info.name), &info);
    EXPECT_FALSE(info.summary.empty());
    const Schedule schedule = info.plan({4, 8, 0});
    EXPECT_EQ(schedule.name, info.name);
    EXPECT_EQ(schedule.placement.kind(), info.placement);
  }
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
  EXPECT_EQ(names.size(), 7U);
}

}  // namespace
}  // namespace dualpipe
