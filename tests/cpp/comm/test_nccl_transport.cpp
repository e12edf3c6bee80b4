#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <latch>
#include <thread>

#include "comm/conformance.h"
#include "comm/harness.h"
#include "comm/nccl_ranks.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

// Keeps what the transports use, for factories that give away transports alone.
class Keeping final : public Transport {
 public:
  Keeping(std::shared_ptr<NcclRanks> ranks, std::size_t rank)
      : ranks_(std::move(ranks)),
        inner_(synchronized(std::move(ranks_->transports[rank]), ranks_->devices[rank])) {}
  void begin_step(const StepInfo& info) override { inner_->begin_step(info); }
  void send(Rank to, const MessageId& id, Message message, const EventPtr& ready) override {
    inner_->send(to, id, std::move(message), ready);
  }
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override {
    return inner_->receive(from, id);
  }
  void end_step() override { inner_->end_step(); }
  void abort(const Failure& failure) noexcept override { inner_->abort(failure); }
  void recover() override { inner_->recover(); }

 private:
  const std::shared_ptr<NcclRanks> ranks_;
  const std::unique_ptr<Transport> inner_;
};

std::vector<std::unique_ptr<Transport>> synchronized_ranks(int num_ranks) {
  const auto ranks =
      std::make_shared<NcclRanks>(num_ranks, NcclRankOptions{.dynamic_shapes = true});
  ranks->connect();
  std::vector<std::unique_ptr<Transport>> transports;
  for (int rank = 0; rank < num_ranks; ++rank) {
    transports.push_back(std::make_unique<Keeping>(ranks, static_cast<std::size_t>(rank)));
  }
  return transports;
}

class NcclConformance : public ::testing::TestWithParam<conformance::Check> {};

TEST_P(NcclConformance, Holds) { GetParam().run(synchronized_ranks); }

// A message has left when the device is through, which may be after the step: see
// NcclTransport.KeepsWhatIsSentUntilItHasLeft.
std::vector<conformance::Check> device_checks() {
  std::vector<conformance::Check> checks = conformance::checks();
  std::erase_if(checks, [](const auto& check) { return check.name == "ReleasesSentMessages"; });
  return checks;
}

INSTANTIATE_TEST_SUITE_P(Threads, NcclConformance, ::testing::ValuesIn(device_checks()),
                         [](const auto& info) { return info.param.name; });

StepInfo shaped_step(std::int64_t step, int rank, std::uint64_t shapes) {
  StepInfo info = step_info(step);
  if (rank == 0) info.shapes = shapes;
  return info;
}

// One step of two ranks; rank 0 sends `layout` and rank 1 computes with what arrives, on streams.
void step_over_streams(NcclRanks& ranks, std::int64_t step, std::uint64_t shapes,
                       const Layout& layout, int num_messages = 3) {
  std::atomic<int> num_right{0};
  run_ranks(2, [&](int rank) {
    Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
    FakeDevice& device = *ranks.devices[static_cast<std::size_t>(rank)];
    transport.begin_step(shaped_step(step, rank, shapes));
    for (int i = 0; i < num_messages; ++i) {
      if (rank == 0) {
        Message message = make_message(layout, 77);
        const Message pattern = make_message(layout, static_cast<unsigned>(i));
        device.compute().launch([message, pattern] {  // late: who does not wait reads 77
          std::this_thread::sleep_for(2ms);
          for (std::size_t t = 0; t < message.num_tensors(); ++t) {
            std::memcpy(message.data[t], pattern.data[t], message.layout[t].num_bytes);
          }
        });
        transport.send(Rank(1), activation(i), std::move(message), device.record());
      } else {
        const Message message = transport.receive(Rank(0), activation(i))->wait();
        EXPECT_TRUE(message.on_device);
        Message view = message;
        view.owner.reset();  // as a kernel has it: the host lets go before the device has read
        device.compute().launch([view, layout, i, &num_right] {
          std::this_thread::sleep_for(1ms);
          if (has_pattern(view, layout, static_cast<unsigned>(i))) ++num_right;
        });
      }
    }
    transport.end_step();
    device.record()->synchronize();
  });
  EXPECT_EQ(num_right, num_messages);
}

TEST(NcclTransport, ReadsAndWritesInTheOrderOfEvents) {
  NcclRanks ranks(2);
  for (int step = 1; step <= 4; ++step) {
    step_over_streams(ranks, step, 1, {bytes_spec(1000), bytes_spec(24)}, 8);
  }
}

TEST(NcclTransport, NothingWaitsForTheDevice) {
  NcclRanks ranks(2);
  ranks.connect();
  std::latch issued(2);
  run_ranks(2, [&](int rank) {
    Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
    FakeDevice& device = *ranks.devices[static_cast<std::size_t>(rank)];
    // No device does anything before both hosts are through with the step.
    device.compute().launch([&] { issued.wait(); });
    transport.begin_step(shaped_step(1, rank, 1));
    const Rank peer(1 - rank);
    auto receive = transport.receive(peer, gradient(0));
    transport.send(peer, gradient(0), make_message({bytes_spec(64)}, 5), device.record());
    const Message message = receive->wait();
    transport.end_step();
    issued.count_down();
    device.record()->synchronize();
    EXPECT_TRUE(has_pattern(message, {bytes_spec(64)}, 5));
  });
}

TEST(NcclTransport, DescribesMessagesInTheFirstStepOfAKindAlone) {
  NcclRanks ranks(2);
  ranks.connect();
  const auto host_messages = [&](std::int64_t step, std::uint64_t shapes) {
    const int before = ranks.fabric.num_messages();
    step_over_streams(ranks, step, shapes, {bytes_spec(8 * shapes)});
    return ranks.fabric.num_messages() - before;
  };
  const int first = host_messages(1, 10);
  const int later = host_messages(2, 10);
  EXPECT_EQ(first - later, 3);
  EXPECT_EQ(host_messages(3, 20), first);
  EXPECT_EQ(host_messages(4, 10), later);
  EXPECT_EQ(host_messages(5, 20), later);
}

TEST(NcclTransport, AShapeThatNobodyCouldForeseeIsTheUsersToDeclare) {
  NcclRanks ranks(2);
  step_over_streams(ranks, 1, 1, {bytes_spec(64)});
  Transport& source = *ranks.transports[0];
  std::thread other([&] { ranks.transports[1]->begin_step(shaped_step(2, 1, 1)); });
  source.begin_step(shaped_step(2, 0, 1));
  other.join();
  const std::string text = text_of<UserError>(
      [&] { source.send(Rank(1), activation(0), make_message({bytes_spec(65)}, 1), nullptr); });
  EXPECT_NE(text.find("[u8 65]; it was [u8 64]"), std::string::npos) << text;
  EXPECT_NE(text.find("dynamic_shapes=True"), std::string::npos) << text;
}

TEST(NcclTransport, KeepsWhatIsSentUntilItHasLeft) {
  NcclRanks ranks(2);
  ranks.connect();
  std::latch may_send(1);
  std::weak_ptr<void> sent;
  run_ranks(2, [&](int rank) {
    Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
    FakeDevice& device = *ranks.devices[static_cast<std::size_t>(rank)];
    transport.begin_step(shaped_step(1, rank, 1));
    if (rank == 0) {
      device.compute().launch([&] { may_send.wait(); });
      Message message = make_message({bytes_spec(64)}, 1);
      sent = message.owner;
      transport.send(Rank(1), activation(0), std::move(message), device.record());
    } else {
      (void)transport.receive(Rank(0), activation(0))->wait();
    }
    transport.end_step();
  });
  EXPECT_FALSE(sent.expired());
  may_send.count_down();
  while (ranks.transports[0]->busy()) std::this_thread::sleep_for(1ms);
  step_over_streams(ranks, 2, 1, {bytes_spec(64)}, 1);
  EXPECT_TRUE(sent.expired());
}

TEST(NcclTransport, AllocatesNothingInTheSteadyState) {
  NcclRanks ranks(2);
  step_over_streams(ranks, 1, 1, {bytes_spec(1000)}, 20);
  step_over_streams(ranks, 2, 1, {bytes_spec(1000)}, 20);
  const int before = ranks.devices[1]->num_allocations();
  for (int step = 3; step < 10; ++step) {
    step_over_streams(ranks, step, 1, {bytes_spec(1000)}, 20);
  }
  EXPECT_EQ(ranks.devices[1]->num_allocations(), before);
}

// Faults

// What the rank that meets a fault says of its step; both ranks end, and the next step works.
std::string text_of_step(NcclRanks& ranks) {
  std::vector<std::string> texts(2);
  run_ranks(2, [&](int rank) {
    const auto own = static_cast<std::size_t>(rank);
    Transport& transport = *ranks.transports[own];
    texts[own] = text_of<PipelineError>([&] {
      transport.begin_step(shaped_step(9, rank, 1));
      if (rank == 0) {
        transport.send(Rank(1), activation(0), make_message({bytes_spec(64)}, 1), nullptr);
      } else {
        (void)transport.receive(Rank(0), activation(0))->wait();
      }
      transport.end_step();
    });
    ranks.transports[1 - own]->abort({Rank(rank), 9, "the other one"});  // as the watchdog does
  });
  run_ranks(2, [&](int rank) { ranks.transports[static_cast<std::size_t>(rank)]->recover(); });
  EXPECT_EQ(ranks.world.num_open_groups(), 0);
  EXPECT_EQ(ranks.world.num_communicators(), 0);
  step_over_streams(ranks, 10, 1, {bytes_spec(64)});
  const std::size_t ended = texts[0] == "the other one" ? 0 : 1;
  EXPECT_EQ(texts[ended], "the other one");
  return texts[1 - ended];
}

TEST(NcclFaults, ASendThatFailsInsideAGroup) {
  NcclRanks ranks(2);
  ranks.connect();
  ranks.world.fail("send", NcclResult::kInvalidArgument);
  const std::string text = text_of_step(ranks);
  EXPECT_NE(text.find("activations from rank 0 to rank 1: cannot send: NCCL says no"),
            std::string::npos)
      << text;
}

TEST(NcclFaults, AGroupThatCannotBeClosed) {
  NcclRanks ranks(2);
  ranks.connect();
  ranks.world.fail("group_end", NcclResult::kSystemError);
  EXPECT_NE(text_of_step(ranks).find("cannot issue a message"), std::string::npos);
}

TEST(NcclFaults, ACommunicatorThatCannotBeMade) {
  for (const char* call :
       {"get_unique_id", "init_pair", "group_start", "group_end", "async_error"}) {
    NcclRanks ranks(2);
    ranks.world.fail(call, NcclResult::kSystemError);
    std::vector<std::string> texts(2);
    run_ranks(2, [&](int rank) {
      const auto own = static_cast<std::size_t>(rank);
      texts[own] = text_of<PipelineError>([&] { ranks.transports[own]->connect(); });
      ranks.transports[1 - own]->abort({Rank(rank), 0, "the other one"});  // as the watchdog does
    });
    EXPECT_EQ(ranks.world.num_open_groups(), 0) << call;
    const bool first = texts[0].find("NCCL says no") != std::string::npos;
    const bool second = texts[1].find("NCCL says no") != std::string::npos;
    EXPECT_NE(first, second) << call << ": " << texts[0] << " / " << texts[1];
    EXPECT_EQ(texts[first ? 1 : 0], "the other one") << call;
    run_ranks(2, [&](int rank) { ranks.transports[static_cast<std::size_t>(rank)]->recover(); });
    EXPECT_EQ(ranks.world.num_communicators(), 0) << call;
    step_over_streams(ranks, 10, 1, {bytes_spec(64)});
  }
}

TEST(NcclFaults, ARankThatNeverConnectsEndsTheOthersInTime) {
  NcclRanks ranks(2, {.timeout = 200ms});
  ranks.world.fail("init_pair", NcclResult::kSystemError);
  std::vector<std::string> texts(2);
  run_ranks(2, [&](int rank) {
    const auto own = static_cast<std::size_t>(rank);
    texts[own] = text_of<PipelineError>([&] { ranks.transports[own]->connect(); });
  });
  const std::string& waited = texts[texts[0].find("NCCL says no") == std::string::npos ? 0 : 1];
  EXPECT_NE(waited.find("does every rank run"), std::string::npos) << waited;
}

TEST(NcclFaults, APeerThatNeverComesEndsInAnErrorInTime) {
  NcclRanks ranks(2, {.timeout = 200ms});
  ranks.connect();
  std::thread late([&] { ranks.transports[1]->begin_step(shaped_step(1, 1, 1)); });
  ranks.transports[0]->begin_step(shaped_step(1, 0, 1));
  late.join();
  ranks.transports[0]->send(Rank(1), activation(4), make_message({bytes_spec(8)}, 0), nullptr);
  EXPECT_EQ(ranks.transports[0]->fault(), std::nullopt);
  std::this_thread::sleep_for(250ms);
  const auto fault = ranks.transports[0]->fault();
  ASSERT_TRUE(fault.has_value());
  EXPECT_NE(fault->find("rank 0's GPU has waited longer than 0.2 s for rank 1 to take the "
                        "activation of micro-batch 4"),
            std::string::npos)
      << *fault;
}

TEST(NcclFaults, AnAsynchronousErrorIsFoundWithoutACall) {
  NcclRanks ranks(2);
  ranks.connect();
  EXPECT_EQ(ranks.transports[0]->fault(), std::nullopt);
  ranks.world.break_network();
  const auto fault = ranks.transports[0]->fault();
  ASSERT_TRUE(fault.has_value());
  EXPECT_NE(fault->find("the peer is gone"), std::string::npos) << *fault;
}

TEST(NcclFaults, APeerThatIsGoneIsNamed) {
  NcclRanks ranks(2);
  ranks.connect();
  ranks.transports[1].reset();
  const auto fault = ranks.transports[0]->fault();
  ASSERT_TRUE(fault.has_value());
  EXPECT_NE(fault->find("rank 1"), std::string::npos) << *fault;
  EXPECT_EQ(ranks.world.num_communicators(), 4);  // rank 0's, until it recovers
}

TEST(NcclFaults, AnAbortEndsWhatTheDeviceWaitsFor) {
  NcclRanks ranks(2);
  ranks.connect();
  std::thread other([&] { ranks.transports[1]->begin_step(shaped_step(1, 1, 1)); });
  ranks.transports[0]->begin_step(shaped_step(1, 0, 1));
  other.join();
  Message message = make_message({bytes_spec(8)}, 0);
  ranks.transports[0]->send(Rank(1), activation(0), std::move(message), nullptr);
  ranks.transports[0]->abort({Rank(1), 1, "rank 1 gave up"});
  EXPECT_EQ(ranks.world.num_communicators(), 4);  // rank 1's
  EXPECT_EQ(text_of<PipelineError>([&] { ranks.transports[0]->end_step(); }), "rank 1 gave up");
}

}  // namespace
}  // namespace dualpipe
