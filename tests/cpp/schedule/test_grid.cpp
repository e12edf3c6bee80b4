#include <algorithm>

#include "helpers.h"
#include "schedule/grid.h"
#include "schedule/sim/simulate.h"

namespace dualpipe {
namespace {

using test::make;

constexpr auto kLoop = PlacementKind::kLoop;

Schedule small() { return make(kLoop, 2, {"0F0 0F1 0B0 0B1", "1F0 (1F1;1B0)OVERLAP_F_B 1B1"}); }

TEST(Grid, DrawsEveryRankAndStep) {
  EXPECT_EQ(to_grid(small(), whole(small())),
            "step   | 0   1       2   3\n"
            "rank 0 | 0F0 0F1     0B0 0B1\n"
            "rank 1 | 1F0 1F1&1B0 1B1\n");
}

TEST(Grid, MarksAPlaceAndShowsItsNeighbourhood) {
  EXPECT_EQ(to_grid(small(), around(small(), Rank(1), 2)),
            "step   | 0   1       2     3\n"
            "rank 0 | 0F0 0F1     0B0   0B1\n"
            "rank 1 | 1F0 1F1&1B0 >1B1<\n");
  const Schedule big = plan("1f1b", {16, 64, 0});
  const std::string window = to_grid(big, around(big, Rank(8), 40));
  EXPECT_EQ(std::count(window.begin(), window.end(), '\n'), 8);
  EXPECT_TRUE(window.starts_with("step    | 36")) << window;
}

TEST(Grid, MarksEachRankWhereItStands) {
  EXPECT_EQ(to_grid(small(), around(small(), Rank(0), std::vector{0, 99})),
            "step   | 0     1       2   3\n"
            "rank 0 | >0F0< 0F1     0B0 0B1\n"
            "rank 1 | 1F0   1F1&1B0 1B1\n");
}

TEST(TimelineGrid, DrawsTimeAndBubbles) {
  const Timeline timeline = simulate(small(), {}, Sends::kLate);
  EXPECT_EQ(to_grid(timeline, 0.25),
            "rank 0 |0F0 0F1 ............0B0     0B1     |\n"
            "rank 1 |....1F0 1F1&1B0     1B1     ........|\n");
}

TEST(TimelineGrid, ShortensWhatHasNoRoom) {
  const Timeline timeline = simulate(make(kLoop, 1, {"0F0 0B0"}), {}, Sends::kLate);
  EXPECT_EQ(to_grid(timeline, 1.0 / 3), "rank 0 |F0 B0    |\n");
  EXPECT_EQ(to_grid(timeline, 0.5), "rank 0 |F B   |\n");
  test::expect_error<ScheduleError>([&] { (void)to_grid(timeline, 0); }, {"unit is 0"});
  test::expect_error<ScheduleError>([&] { (void)to_grid(timeline, 1e-9); }, {"unit is 1e-09"});
}

}  // namespace
}  // namespace dualpipe
