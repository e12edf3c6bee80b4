#include "helpers.h"

namespace dualpipe {
namespace {

using test::expect_error;

constexpr auto kLoop = PlacementKind::kLoop;

TEST(Csv, RoundTripsEveryPlan) {
  test::for_each_plan(6, [](const Schedule& schedule) {
    const Schedule read =
        schedule_from_csv(to_csv(schedule), schedule.placement.kind(), schedule.num_stages());
    EXPECT_EQ(read, schedule);
    EXPECT_EQ(digest(read), digest(schedule));
  });
}

TEST(Csv, RoundTripsALoweredSchedule) {
  const Schedule lowered = lower(plan("dualpipe", {4, 8, 0}), {.reduce_gradients = true});
  const Schedule read = schedule_from_csv(to_csv(lowered), PlacementKind::kBidirectional, 4);
  EXPECT_EQ(read, lowered);
}

TEST(Csv, AcceptsEmptyCellsSpacesAndWindowsLineEnds) {
  const Schedule schedule =
      schedule_from_csv("0F0,, 0F1 ,0B0,0B1,\r\n,1F0,1B0,\t1F1,1B1\r\n\r\n", kLoop, 2);
  EXPECT_EQ(test::text_of(schedule, 0), "0F0 0F1 0B0 0B1");
  EXPECT_EQ(test::text_of(schedule, 1), "1F0 1B0 1F1 1B1");
  EXPECT_EQ(schedule.num_microbatches(), 2);
}

TEST(Csv, CountsMicrobatchesInBothHalvesOfAPair) {
  const Schedule schedule = schedule_from_csv("0F0,(0F1;0B4)OVERLAP_F_B\n", kLoop, 1);
  EXPECT_EQ(schedule.num_microbatches(), 5);
}

TEST(Csv, NamesLineAndColumn) {
  const auto read = [](const char* text) {
    return [=] { (void)schedule_from_csv(text, kLoop, 2); };
  };
  expect_error<ScheduleError>(read("0F0,0B0\n1F0, 1Q0\n"), {"line 2, column 7:", "\"1Q0\""});
  expect_error<ScheduleError>(read("0F0,0F0x"), {"line 1, column 8:", "the end"});
  expect_error<ScheduleError>(read("0F0\n2F0\n"), {"line 2, column 1:", "stage 2", "0..1"});
  expect_error<ScheduleError>(read("0F0\n(0F0;5B1)OVERLAP_F_B\n"), {"line 2", "stage 5"});
  expect_error<ScheduleError>(read("0F0\n\n1F0\n"), {"line 2, column 1:", "rank 1 has no actions"});
  expect_error<ScheduleError>(read(""), {"empty"});
  expect_error<ScheduleError>(read("0REDUCE_GRAD\n1REDUCE_GRAD"), {"computes nothing"});
  expect_error<ScheduleError>(read("0F0\n1F0\n0F1\n"), {"num_stages is 2", "num_ranks = 3"});
}

TEST(Digest, ChangesWithAnyPartOfTheSchedule) {
  const Schedule schedule = plan("dualpipe", {4, 8, 0});
  Schedule other = schedule;
  std::swap(test::row_of(other, 1)[0], test::row_of(other, 1)[1]);
  EXPECT_NE(digest(other), digest(schedule));
  other = schedule;
  test::row_of(other, 3).pop_back();
  EXPECT_NE(digest(other), digest(schedule));
  other = schedule;
  std::swap(other.rows[0], other.rows[3]);
  EXPECT_NE(digest(other), digest(schedule));
}

TEST(Schedule, IsItsContentAndNotItsName) {
  const Schedule schedule = plan("dualpipe", {4, 8, 0});
  Schedule other = schedule;
  other.name = "mine";
  EXPECT_EQ(other, schedule);
  EXPECT_EQ(digest(other), digest(schedule));
  std::swap(other.rows[0], other.rows[3]);
  EXPECT_NE(other, schedule);
}

// Ranks on different machines compare digests: the value is part of the contract.
TEST(Digest, IsTheSameEverywhere) {
  EXPECT_EQ(digest(plan("dualpipe", {4, 8, 0})), 17891416482164529365ULL);
}

}  // namespace
}  // namespace dualpipe
