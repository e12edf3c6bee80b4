#include "helpers.h"
#include "schedule/channel.h"

namespace dualpipe {
namespace {

using test::expect_error;
using test::make;
using test::text_of;

constexpr auto kLoop = PlacementKind::kLoop;

Schedule two_ranks() { return make(kLoop, 2, {"0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"}); }

Schedule with_pair() {
  return make(PlacementKind::kBidirectional, 2,
              {"0F0 0F1 1F2 (1F3;0B0)OVERLAP_F_B 1B2 1B3 0B1",
               "0F2 0F3 1F0 (1F1;0B2)OVERLAP_F_B 1B0 1B1 0B3"});
}

TEST(SplitBackward, LeavesTheFirstStageWhole) {
  const Schedule split = split_backward(two_ranks());
  EXPECT_EQ(text_of(split, 0), "0F0 0F1 0B0 0B1");
  EXPECT_EQ(text_of(split, 1), "1F0 1I0 1W0 1F1 1I1 1W1");
}

TEST(SplitBackward, SplitsPairsWhereAsked) {
  const Schedule pair = make(kLoop, 2, {"0F0 0F1 0B0 0B1", "1F0 (1F1;1B0)OVERLAP_F_B 1B1"});
  EXPECT_EQ(text_of(split_backward(pair), 1), "1F0 (1F1;1I0)OVERLAP_F_B 1W0 1I1 1W1");
  EXPECT_EQ(text_of(split_backward(pair, false), 1), "1F0 (1F1;1B0)OVERLAP_F_B 1I1 1W1");
}

TEST(SerializeOverlap, RunsTheForwardFirst) {
  EXPECT_EQ(text_of(serialize_overlap(with_pair()), 0), "0F0 0F1 1F2 1F3 0B0 1B2 1B3 0B1");
}

TEST(ForwardOnly, KeepsForwardsAndTheirMessages) {
  EXPECT_EQ(text_of(forward_only(with_pair()), 0), "0F0 0F1 1F2 1F3");
  const Schedule lowered = lower(two_ranks(), {});
  EXPECT_EQ(text_of(forward_only(lowered), 1), "1RECV_F0 1F0 1RECV_F1 1F1");
}

TEST(LowerCommunication, SendsRightAfterTheResultAndAsksInTime) {
  const Schedule at_use = lower_communication(two_ranks(), 0);
  EXPECT_EQ(text_of(at_use, 0), "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1");
  EXPECT_EQ(text_of(at_use, 1), "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1");
  const Schedule ahead = lower_communication(two_ranks(), 1);
  EXPECT_EQ(text_of(ahead, 0), "0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1");
  EXPECT_EQ(text_of(ahead, 1), "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1");
}

// Rank 0 makes micro-batch 0 first; rank 1 uses micro-batch 1 first: both receives come before that
// use, in the order of the sends.
TEST(LowerCommunication, AsksInTheOrderOfTheSource) {
  const Schedule schedule = make(kLoop, 2, {"0F0 0F1 0B1 0B0", "1F1 1B1 1F0 1B0"});
  EXPECT_EQ(text_of(lower_communication(schedule, 0), 1),
            "1RECV_F0 1RECV_F1 1F1 1B1 1SEND_B1 1F0 1B0 1SEND_B0");
}

TEST(LowerCommunication, HandsOverWithinARankWithoutAMessage) {
  const Schedule v = make(PlacementKind::kV, 4, {"0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0"});
  EXPECT_EQ(text_of(lower_communication(v, 0), 1),
            "1RECV_F0 1F0 2F0 2SEND_F0 2RECV_B0 2B0 1B0 1SEND_B0");
  const Schedule alone = make(kLoop, 2, {"0F0 1F0 1B0 0B0"});
  EXPECT_EQ(text_of(lower_communication(alone, 2), 0), "0F0 1F0 1B0 0B0");
}

TEST(LowerCommunication, WrapsAroundTheLoop) {
  const Schedule loop = make(kLoop, 4, {"0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0"});
  EXPECT_EQ(text_of(lower_communication(loop, 0), 0),
            "0F0 0SEND_F0 2RECV_F0 2F0 2SEND_F0 2RECV_B0 2B0 2SEND_B0 0RECV_B0 0B0");
}

TEST(LowerCommunication, RefusesWhatItCannotLower) {
  expect_error<ScheduleError>([] { (void)lower_communication(two_ranks(), -1); },
                              {"lookahead is -1", "0 (right before the use)"});
  expect_error<ScheduleError>(
      [] { (void)lower_communication(lower_communication(two_ranks(), 0), 0); },
      {"0SEND_F0", "once"});
  expect_error<ScheduleError>(
      [] { (void)lower_communication(make(kLoop, 2, {"0F0 0B0", "1B0"}), 0); },
      {"1RECV_F0", "rank 1", "never uses it"});
}

TEST(PlaceReduceGrad, ComesAfterTheLastWeightsWhereStagesHaveMirrors) {
  EXPECT_EQ(text_of(place_reduce_grad(with_pair()), 0),
            "0F0 0F1 1F2 (1F3;0B0)OVERLAP_F_B 1B2 1B3 1REDUCE_GRAD 0B1 0REDUCE_GRAD");
  EXPECT_EQ(place_reduce_grad(two_ranks()), two_ranks());
}

TEST(Lower, SerialPairsSendEachResultAsSoonAsItIsThere) {
  const Schedule lowered = lower(plan("dualpipe", {4, 8, 0}), {.lookahead = 0});
  const std::string row = text_of(lowered, 0);
  EXPECT_NE(row.find("0F3 0SEND_F3 3I5 3SEND_B5 3W5 3RECV_F6"), std::string::npos) << row;
  EXPECT_EQ(row.find("OVERLAP"), std::string::npos);
  const std::string inner = text_of(lowered, 1);
  EXPECT_NE(inner.find("1F3 1SEND_F3 2RECV_B5 2I5 2SEND_B5 2W5"), std::string::npos) << inner;
}

TEST(Lower, KeptPairsStayOnePieceAndSendAtTheirEnd) {
  const Schedule lowered =
      lower(plan("dualpipe", {4, 8, 0}), {.keep_overlap = true, .lookahead = 0});
  const std::string row = text_of(lowered, 1);
  EXPECT_NE(row.find("(1F3;2B5)OVERLAP_F_B 1SEND_F3 2SEND_B5 "), std::string::npos) << row;
  EXPECT_NE(row.find("2I6 2SEND_B6 2W6"), std::string::npos) << row;
}

TEST(Lower, ASplitPairSendsBothBeforeItsWeights) {
  Schedule schedule = split_backward(plan("dualpipe", {4, 8, 0}));
  const std::string row = text_of(lower_communication(std::move(schedule), 0), 1);
  EXPECT_NE(row.find("(1F3;2I5)OVERLAP_F_B 1SEND_F3 2SEND_B5 2W5"), std::string::npos) << row;
}

TEST(Lower, ReducesAfterTheLastResultHasLeft) {
  const Schedule lowered =
      lower(plan("dualpipe", {4, 8, 0}), {.reduce_gradients = true, .lookahead = 0});
  EXPECT_TRUE(text_of(lowered, 1).ends_with("2W7 2REDUCE_GRAD 1W3 1REDUCE_GRAD"));
  const std::string row = text_of(lowered, 0);
  EXPECT_NE(row.find("3I7 3SEND_B7 3W7 3REDUCE_GRAD"), std::string::npos) << row;
}

TEST(Lower, InferenceHasNoBackward) {
  const Schedule lowered =
      lower(plan("dualpipev", {3, 6, 0}), {.with_backward = false, .reduce_gradients = true});
  for (const auto& row : lowered.rows) {
    for (const Action& action : row) {
      EXPECT_TRUE(action.op() == Op::kForward || action.op() == Op::kSendForward ||
                  action.op() == Op::kRecvForward)
          << to_string(action);
    }
  }
  EXPECT_EQ(test::joined(verify_lowered(lowered)), "");
}

TEST(Lower, KeepsTheOrderOfComputation) {
  test::for_each_plan(6, [](const Schedule& schedule) {
    Schedule lowered = lower_communication(schedule, 3);
    for (auto& row : lowered.rows) {
      std::erase_if(row, [](const Action& action) { return !is_compute(action.op()); });
    }
    EXPECT_EQ(lowered, schedule);
  });
}

}  // namespace
}  // namespace dualpipe
