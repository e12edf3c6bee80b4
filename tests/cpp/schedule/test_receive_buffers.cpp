#include <algorithm>

#include "helpers.h"

namespace dualpipe {
namespace {

using test::make;

constexpr auto kLoop = PlacementKind::kLoop;

BufferAssignment assign(const Schedule& lowered, int rank) {
  return assign_receive_buffers(lowered, Rank(rank));
}

TEST(ReceiveBuffers, AreReusedAfterTheBackward) {
  const Schedule schedule = lower_communication(
      make(kLoop, 2, {"0F0 0B0 0F1 0B1 0F2 0B2", "1F0 1B0 1F1 1B1 1F2 1B2"}), 0);
  EXPECT_EQ(assign(schedule, 1).buffer_of_recv, (std::vector{0, 0, 0}));
  EXPECT_EQ(assign(schedule, 1).num_buffers, 1);
}

TEST(ReceiveBuffers, AreHeldUntilADeferredWeight) {
  const Schedule schedule =
      lower_communication(make(kLoop, 2, {"0F0 0B0 0F1 0B1", "1F0 1I0 1F1 1I1 1W0 1W1"}), 0);
  EXPECT_EQ(assign(schedule, 1).buffer_of_recv, (std::vector{0, 1}));
}

TEST(ReceiveBuffers, EndWithTheForwardInInference) {
  const Schedule schedule =
      lower(plan("1f1b", {2, 8, 0}), {.with_backward = false, .lookahead = 0});
  EXPECT_EQ(assign(schedule, 1).num_buffers, 1);
}

TEST(ReceiveBuffers, StayFewHoweverManyMicrobatchesThereAre) {
  for (int n : {16, 64, 256}) {
    const Schedule lowered = lower(plan("dualpipe", {4, n, 0}), {});
    for (int r = 0; r < 4; ++r) {
      const BufferAssignment assignment = assign(lowered, r);
      EXPECT_LE(assignment.num_buffers, 2 * (4 + 1) + 2 * 2) << "rank " << r << ", N = " << n;
    }
  }
}

TEST(ReceiveBuffers, NoBufferIsSharedAtOneTime) {
  test::for_each_plan(6, [](const Schedule& schedule) {
    const Schedule lowered = lower(schedule, {.lookahead = 4});
    for (int r = 0; r < lowered.num_ranks(); ++r) {
      const BufferAssignment assignment = assign(lowered, r);
      EXPECT_EQ(test::joined(verify_buffers(lowered, Rank(r), assignment)), "");
    }
  });
}

TEST(ReceiveBuffers, AWrongAssignmentIsFound) {
  const Schedule lowered = lower(plan("1f1b", {2, 4, 0}), {});
  BufferAssignment assignment = assign(lowered, 1);
  std::fill(assignment.buffer_of_recv.begin(), assignment.buffer_of_recv.end(), 0);
  EXPECT_NE(test::joined(verify_buffers(lowered, Rank(1), assignment)).find("refills buffer 0"),
            std::string::npos);
  assignment = assign(lowered, 1);
  assignment.buffer_of_recv.pop_back();
  EXPECT_NE(test::joined(verify_buffers(lowered, Rank(1), assignment)).find("no receive buffer"),
            std::string::npos);
  assignment = assign(lowered, 1);
  assignment.buffer_of_recv[0] = assignment.num_buffers;
  EXPECT_NE(test::joined(verify_buffers(lowered, Rank(1), assignment)).find("fills buffer"),
            std::string::npos);
}

}  // namespace
}  // namespace dualpipe
