#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "comm/device_steps.h"
#include "comm/harness.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

// The error text of the rank that meets a fault; then no communicators are left, and a step works.
std::string text_of_step(DeviceRanks& ranks) {
  const std::string text = text_of_failing_step(ranks);
  ranks.world.nccl.wait_until_groups_are_closed();
  EXPECT_EQ(ranks.world.nccl.num_communicators(), 0);
  step_over_streams(ranks, 10, 1, {bytes_spec(64)});
  return text;
}

TEST(NcclFaults, ASendThatFailsInsideAGroup) {
  DeviceRanks ranks(LinkKind::kNccl, 2);
  ranks.connect();
  ranks.world.nccl.fail("send", NcclResult::kInvalidArgument);
  const std::string text = text_of_step(ranks);
  EXPECT_NE(text.find("activations from rank 0 to rank 1: cannot send: NCCL says no"),
            std::string::npos)
      << text;
}

TEST(NcclFaults, AGroupThatCannotBeClosed) {
  DeviceRanks ranks(LinkKind::kNccl, 2);
  ranks.connect();
  ranks.world.nccl.fail("group_end", NcclResult::kSystemError);
  EXPECT_NE(text_of_step(ranks).find("cannot issue a message"), std::string::npos);
}

TEST(NcclFaults, ACommunicatorThatCannotBeMade) {
  for (const char* call : {"get_unique_id", "init_pair", "group_start", "group_end"}) {
    DeviceRanks ranks(LinkKind::kNccl, 2);
    ranks.world.nccl.fail(call, NcclResult::kSystemError);
    std::vector<std::string> texts(2);
    run_ranks(2, [&](int rank) {
      const auto own = static_cast<std::size_t>(rank);
      texts[own] = text_of<PipelineError>([&] { ranks.transports[own]->connect(); });
      ranks.transports[1 - own]->abort({Rank(rank), 0, "the other one"});  // as the watchdog does
    });
    ranks.world.nccl.wait_until_groups_are_closed();
    const bool first = texts[0].find("NCCL says no") != std::string::npos;
    const bool second = texts[1].find("NCCL says no") != std::string::npos;
    EXPECT_NE(first, second) << call << ": " << texts[0] << " / " << texts[1];
    EXPECT_EQ(texts[first ? 1 : 0], "the other one") << call;
    run_ranks(2, [&](int rank) { ranks.transports[static_cast<std::size_t>(rank)]->recover(); });
    // The other rank may have a thread that waits in NCCL forever, with its communicators.
    EXPECT_LE(ranks.world.nccl.num_communicators(), 8) << call;
    step_over_streams(ranks, 10, 1, {bytes_spec(64)});
  }
}

TEST(NcclFaults, ARankThatNeverConnectsEndsTheOthersInTime) {
  DeviceRanks ranks(LinkKind::kNccl, 2, {.timeout = 200ms});
  ranks.world.nccl.fail("init_pair", NcclResult::kSystemError);
  std::vector<std::string> texts(2);
  run_ranks(2, [&](int rank) {
    const auto own = static_cast<std::size_t>(rank);
    texts[own] = text_of<PipelineError>([&] { ranks.transports[own]->connect(); });
  });
  const std::string& waited = texts[texts[0].find("NCCL says no") == std::string::npos ? 0 : 1];
  EXPECT_NE(waited.find("does every rank run"), std::string::npos) << waited;
}

TEST(NcclFaults, AnAsynchronousErrorIsFoundWithoutACall) {
  DeviceRanks ranks(LinkKind::kNccl, 2);
  ranks.connect();
  std::thread other([&] { ranks.transports[1]->begin_step(shaped_step(1, 1, 1)); });
  ranks.transports[0]->begin_step(shaped_step(1, 0, 1));
  other.join();
  ranks.transports[0]->send(Rank(1), activation(0), make_message({bytes_spec(8)}, 0), nullptr);
  EXPECT_EQ(ranks.transports[0]->fault(), std::nullopt);
  ranks.world.nccl.break_network();
  const auto fault = ranks.transports[0]->fault();
  ASSERT_TRUE(fault.has_value());
  EXPECT_NE(fault->find("the peer is gone"), std::string::npos) << *fault;
}

TEST(NcclFaults, AnAbortFreesARankThatWaitsToIssueAMessage) {
  DeviceRanks ranks(LinkKind::kNccl, 2);
  ranks.connect();
  Transport& stuck = *ranks.transports[0];
  std::thread other([&] { ranks.transports[1]->begin_step(shaped_step(1, 1, 1)); });
  stuck.begin_step(shaped_step(1, 0, 1));
  other.join();
  ranks.world.nccl.fill_queues();
  std::thread sender(
      [&] { stuck.send(Rank(1), activation(0), make_message({bytes_spec(8)}, 0), nullptr); });
  while (!ranks.world.nccl.is_blocked(sender.get_id())) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(stuck.fault(), std::nullopt);  // the watchdog asks this and must not be blocked as well
  stuck.abort({Rank(1), 1, "the other one"});
  sender.join();
  EXPECT_EQ(text_of<PipelineError>([&] {
              stuck.send(Rank(1), activation(1), make_message({bytes_spec(8)}, 0), nullptr);
            }),
            "the other one");
}

}  // namespace
}  // namespace dualpipe
