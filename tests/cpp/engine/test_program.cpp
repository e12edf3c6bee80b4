#include <gtest/gtest.h>

#include <set>

#include "common/error.h"
#include "engine/program.h"
#include "schedule/passes/passes.h"
#include "schedule/planners/planners.h"
#include "schedule/verify/verify.h"

namespace dualpipe {
namespace {

Schedule lowered(std::string_view planner, int num_ranks, int num_microbatches,
                 const LoweringOptions& options = {}) {
  return lower(plan(planner, {num_ranks, num_microbatches}), options);
}

const Instruction& find(const Program& program, const std::string& text) {
  for (const Instruction& instruction : program.instructions) {
    if (to_string(instruction.action) == text) return instruction;
  }
  throw std::out_of_range(text);
}

TEST(Program, ResolvesTheEndsAndTheMiddleOfALinearPipeline) {
  const Program program = make_program(lowered("1f1b", 3, 4), Rank(1), "a test");
  const Instruction& forward = find(program, "1F2");
  EXPECT_EQ(forward.first.source, Source::kReceive);
  EXPECT_EQ(find(program, "1RECV_F2").index, forward.first.index);
  EXPECT_EQ(find(program, "1SEND_F2").index, forward.first.result_slot);
  const Instruction& backward = find(program, "1I2");
  EXPECT_EQ(backward.first.source, Source::kReceive);
  EXPECT_EQ(find(program, "1SEND_B2").index, backward.first.result_slot);

  const Program first = make_program(lowered("1f1b", 3, 4), Rank(0), "a test");
  EXPECT_EQ(find(first, "0F2").first.source, Source::kRunner);
  EXPECT_EQ(find(first, "0B2").first.result_slot, -1);
  const Program last = make_program(lowered("1f1b", 3, 4), Rank(2), "a test");
  EXPECT_EQ(find(last, "2I2").first.source, Source::kRunner);
  EXPECT_EQ(find(last, "2F2").first.result_slot, -1);
}

TEST(Program, NamesPeersAndMessages) {
  const Program program = make_program(lowered("1f1b", 3, 4), Rank(1), "a test");
  EXPECT_EQ(find(program, "1SEND_F2").peer, Rank(2));
  EXPECT_EQ(find(program, "1SEND_F2").message,
            (MessageId{MessageKind::kActivation, Stage(2), Microbatch(2)}));
  EXPECT_EQ(find(program, "1RECV_F2").peer, Rank(0));
  EXPECT_EQ(find(program, "1RECV_F2").message,
            (MessageId{MessageKind::kActivation, Stage(1), Microbatch(2)}));
  EXPECT_EQ(find(program, "1SEND_B2").peer, Rank(0));
  EXPECT_EQ(find(program, "1SEND_B2").message,
            (MessageId{MessageKind::kGradient, Stage(0), Microbatch(2)}));
  EXPECT_EQ(find(program, "1RECV_B2").peer, Rank(2));
  EXPECT_EQ(find(program, "1RECV_B2").message,
            (MessageId{MessageKind::kGradient, Stage(1), Microbatch(2)}));
}

TEST(Program, SendsBothDirectionsOfDualPipeTheirOwnWay) {
  const Program program = make_program(lowered("dualpipe", 4, 8), Rank(0), "a test");
  EXPECT_EQ(find(program, "0SEND_F0").peer, Rank(1));  // down
  EXPECT_EQ(find(program, "3RECV_F4").peer, Rank(1));  // up: stage 2 sits on rank 1
  EXPECT_EQ(find(program, "3SEND_B4").peer, Rank(1));
}

TEST(Program, HandsOverWithinARankThroughASlot) {
  const Program program = make_program(lowered("dualpipev", 2, 4), Rank(1), "a test");
  const Instruction& giver = find(program, "1F0");
  const Instruction& taker = find(program, "2F0");
  EXPECT_EQ(taker.first.source, Source::kSlot);
  EXPECT_EQ(taker.first.index, giver.first.result_slot);
}

TEST(Program, ResolvesBothHalvesOfAPair) {
  LoweringOptions options;
  options.keep_overlap = true;
  const Schedule schedule = lowered("dualpipe", 4, 8, options);
  const Program program = make_program(schedule, Rank(1), "a test");
  int num_pairs = 0;
  for (const Instruction& instruction : program.instructions) {
    if (instruction.action.op() != Op::kOverlap) continue;
    ++num_pairs;
    EXPECT_EQ(instruction.first.action, instruction.action.forward_half());
    EXPECT_EQ(instruction.second.action, instruction.action.backward_half());
    EXPECT_NE(instruction.first.result_slot, instruction.second.result_slot);
  }
  EXPECT_EQ(num_pairs, 3);
}

// Every receive is used once, every slot is filled once and emptied once.
TEST(Program, UsesEachReceiveAndEachSlotOnce) {
  for (const PlannerInfo& planner : planners()) {
    const Schedule schedule = lowered(planner.name, 4, 8);
    for (int rank = 0; rank < 4; ++rank) {
      const Program program = make_program(schedule, Rank(rank), "a test");
      std::multiset<int> received, filled, emptied;
      for (const Instruction& instruction : program.instructions) {
        if (is_send(instruction.action.op())) emptied.insert(instruction.index);
        if (!is_compute(instruction.action.op())) continue;
        for (const Computation* part : {&instruction.first, &instruction.second}) {
          if (part->source == Source::kReceive) received.insert(part->index);
          if (part->source == Source::kSlot) emptied.insert(part->index);
          if (part->result_slot >= 0) filled.insert(part->result_slot);
        }
      }
      EXPECT_EQ(received.size(), program.receives.size()) << planner.name;
      EXPECT_EQ(std::set(received.begin(), received.end()).size(), received.size());
      EXPECT_EQ(static_cast<int>(filled.size()), program.num_slots) << planner.name;
      EXPECT_EQ(filled, emptied) << planner.name;
    }
  }
}

TEST(Program, FindsTheInstructionOfEachReceive) {
  const Program program = make_program(lowered("dualpipe", 4, 8), Rank(2), "a test");
  for (std::size_t i = 0; i < program.receives.size(); ++i) {
    const auto at = static_cast<std::size_t>(program.receives[i]);
    EXPECT_TRUE(is_recv(program.instructions[at].action.op()));
    EXPECT_EQ(program.instructions[at].index, static_cast<int>(i));
  }
}

TEST(Program, SharesItsDigestWithTheOtherRanksOfTheScheduleAlone) {
  const Schedule schedule = lowered("dualpipe", 4, 8);
  EXPECT_EQ(make_program(schedule, Rank(0), "a test").digest,
            make_program(schedule, Rank(3), "a test").digest);
  EXPECT_NE(make_program(schedule, Rank(0), "a test").digest,
            make_program(lowered("dualpipe", 4, 10), Rank(0), "a test").digest);
  LoweringOptions inference;
  inference.with_backward = false;
  EXPECT_NE(make_program(schedule, Rank(0), "a test").digest,
            make_program(lowered("dualpipe", 4, 8, inference), Rank(0), "a test").digest);
}

TEST(Program, PlansThePeakOfDualPipe) {
  for (int num_ranks : {2, 4, 8}) {
    const Schedule schedule = lowered("dualpipe", num_ranks, 3 * num_ranks);
    for (int rank = 0; rank < num_ranks; ++rank) {
      EXPECT_EQ(make_program(schedule, Rank(rank), "").planned_peak_activations, num_ranks + 1);
    }
  }
}

TEST(Program, RefusesDataThatNobodyMade) {
  Schedule schedule = lowered("1f1b", 2, 4);
  auto& row = schedule.rows[1];
  std::erase_if(row, [](const Action& action) { return to_string(action) == "1RECV_F3"; });
  EXPECT_THROW((void)make_program(schedule, Rank(1), ""), InternalError);
}

TEST(Program, ReducesTheStagesItIsGiven) {
  const Program program = make_reduce_program(Rank(1), {Stage(1), Stage(2)}, "a test");
  ASSERT_EQ(program.instructions.size(), 2u);
  EXPECT_EQ(to_string(program.instructions[0].action), "1REDUCE_GRAD");
  EXPECT_EQ(to_string(program.instructions[1].action), "2REDUCE_GRAD");
  EXPECT_EQ(program.digest, make_reduce_program(Rank(0), {}, "a test").digest);
  EXPECT_NE(program.digest, make_reduce_program(Rank(0), {}, "another one").digest);
}

TEST(MessageWays, AreThoseOfTheSchedule) {
  const auto ways_of = [](const char* planner, int rank) {
    const Schedule lowered = lower(plan(planner, {4, 8}), {});
    return message_ways(make_program(lowered, Rank(rank), "a test"));
  };
  constexpr auto kActivation = MessageKind::kActivation;
  constexpr auto kGradient = MessageKind::kGradient;
  using Ways = std::vector<MessageWay>;
  EXPECT_EQ(ways_of("1f1b", 0), (Ways{{Rank(1), kActivation, true}, {Rank(1), kGradient, false}}));
  EXPECT_EQ(ways_of("dualpipe", 0), (Ways{{Rank(1), kActivation, false},
                                          {Rank(1), kActivation, true},
                                          {Rank(1), kGradient, false},
                                          {Rank(1), kGradient, true}}));
  EXPECT_EQ(ways_of("dualpipe", 2).size(), 8);
}

}  // namespace
}  // namespace dualpipe
