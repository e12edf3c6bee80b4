#include <algorithm>

#include "helpers.h"
#include "schedule/channel.h"
#include "schedule/placement.h"

namespace dualpipe {
namespace {

using test::expect_error;

TEST(Placement, LoopWrapsAround) {
  const Placement loop(PlacementKind::kLoop, 3, 6, 4);
  EXPECT_EQ(loop.rank_of(Stage(2), Microbatch(0)), Rank(2));
  EXPECT_EQ(loop.rank_of(Stage(4), Microbatch(3)), Rank(1));
  EXPECT_EQ(loop.stages_of(Rank(1)), (std::vector{Stage(1), Stage(4)}));
  EXPECT_FALSE(loop.mirror_of(Rank(1)).valid());
}

TEST(Placement, VTurnsOnTheLastRank) {
  const Placement v(PlacementKind::kV, 3, 6, 4);
  EXPECT_EQ(v.rank_of(Stage(2), Microbatch(0)), Rank(2));
  EXPECT_EQ(v.rank_of(Stage(3), Microbatch(0)), Rank(2));
  EXPECT_EQ(v.rank_of(Stage(5), Microbatch(0)), Rank(0));
  EXPECT_EQ(v.stages_of(Rank(1)), (std::vector{Stage(1), Stage(4)}));
  EXPECT_FALSE(v.mirror_of(Rank(1)).valid());
}

TEST(Placement, BidirectionalSendsTheSecondHalfUp) {
  const Placement both(PlacementKind::kBidirectional, 4, 4, 8);
  EXPECT_EQ(both.direction_of(Microbatch(3)), Direction::kDown);
  EXPECT_EQ(both.direction_of(Microbatch(4)), Direction::kUp);
  EXPECT_EQ(both.rank_of(Stage(1), Microbatch(3)), Rank(1));
  EXPECT_EQ(both.rank_of(Stage(1), Microbatch(4)), Rank(2));
  EXPECT_EQ(both.stages_of(Rank(1)), (std::vector{Stage(1), Stage(2)}));
  EXPECT_EQ(both.mirror_of(Rank(1)), Rank(2));
}

TEST(Placement, EveryCellLivesOnARankThatHoldsItsStage) {
  for (const Placement& placement :
       {Placement(PlacementKind::kLoop, 3, 9, 4), Placement(PlacementKind::kV, 3, 6, 4),
        Placement(PlacementKind::kBidirectional, 4, 4, 8)}) {
    for (int s = 0; s < placement.num_stages(); ++s) {
      for (int m = 0; m < placement.num_microbatches(); ++m) {
        const Rank rank = placement.rank_of(Stage(s), Microbatch(m));
        const auto stages = placement.stages_of(rank);
        EXPECT_NE(std::find(stages.begin(), stages.end(), Stage(s)), stages.end());
      }
    }
  }
}

TEST(Placement, RefusesSizesThatCannotBe) {
  const auto place = [](PlacementKind kind, int ranks, int stages, int microbatches) {
    return [=] { (void)Placement(kind, ranks, stages, microbatches); };
  };
  expect_error<ScheduleError>(place(PlacementKind::kLoop, 0, 1, 1), {"num_ranks is 0"});
  expect_error<ScheduleError>(place(PlacementKind::kLoop, 1, 1, 0), {"num_microbatches is 0"});
  expect_error<ScheduleError>(place(PlacementKind::kLoop, 1, 70000, 1), {"70000", "1..65535"});
  expect_error<ScheduleError>(place(PlacementKind::kLoop, 2, 3, 1), {"num_stages is 3", "= 2"});
  expect_error<ScheduleError>(place(PlacementKind::kV, 2, 2, 1), {"num_stages is 2", "4"});
  expect_error<ScheduleError>(place(PlacementKind::kBidirectional, 3, 3, 2), {"is 3", "use 4"});
  expect_error<ScheduleError>(place(PlacementKind::kBidirectional, 2, 4, 2), {"is 4", "ranks: 2"});
  expect_error<ScheduleError>(place(PlacementKind::kBidirectional, 2, 2, 5), {"is 5", "use 6"});
  expect_error<ScheduleError>([] { (void)parse_placement_kind("w"); }, {"\"w\"", "bidirectional"});
}

TEST(Placement, NamesRoundTrip) {
  for (auto kind : {PlacementKind::kLoop, PlacementKind::kV, PlacementKind::kBidirectional}) {
    EXPECT_EQ(parse_placement_kind(to_string(kind)), kind);
  }
}

TEST(Channel, OneForEachKindAndNeighbour) {
  const Placement both(PlacementKind::kBidirectional, 4, 4, 8);
  const auto channel = [&](const char* send) {
    return channel_of(both, *output_of(both, parse_action(send)));
  };
  EXPECT_EQ(channel("1SEND_F0"), (Channel{Rank(1), Rank(2), TransferKind::kActivation}));
  EXPECT_EQ(channel("1SEND_F4"), (Channel{Rank(2), Rank(1), TransferKind::kActivation}));
  EXPECT_EQ(channel("2SEND_B0"), (Channel{Rank(2), Rank(1), TransferKind::kGradient}));
  EXPECT_NE(channel_index(both, channel("1SEND_F4")), channel_index(both, channel("2SEND_B0")));
  EXPECT_EQ(channel("1SEND_F0"), channel_of(both, *input_of(both, parse_action("2RECV_F0"))));
}

TEST(Channel, NothingCrossesTheEndsOfThePipeline) {
  const Placement loop(PlacementKind::kLoop, 2, 2, 2);
  EXPECT_FALSE(input_of(loop, parse_action("0F0")));
  EXPECT_FALSE(output_of(loop, parse_action("1F0")));
  EXPECT_FALSE(input_of(loop, parse_action("1B0")));
  EXPECT_FALSE(output_of(loop, parse_action("0B0")));
  EXPECT_FALSE(output_of(loop, parse_action("1W0")));
}

TEST(Channel, SendsAndReceivesNameTheSameMessage) {
  const Placement loop(PlacementKind::kLoop, 2, 4, 2);
  const Transfer activation = *output_of(loop, parse_action("1F1"));
  EXPECT_EQ(to_string(send_action(activation)), "1SEND_F1");
  EXPECT_EQ(to_string(recv_action(activation)), "2RECV_F1");
  const Transfer gradient = *output_of(loop, parse_action("2I1"));
  EXPECT_EQ(to_string(send_action(gradient)), "2SEND_B1");
  EXPECT_EQ(to_string(recv_action(gradient)), "1RECV_B1");
}

}  // namespace
}  // namespace dualpipe
