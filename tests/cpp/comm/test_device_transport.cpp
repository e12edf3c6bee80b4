#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <latch>
#include <thread>
#include <tuple>

#include "comm/conformance.h"
#include "comm/device_steps.h"
#include "comm/harness.h"
#include "comm/quiet.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

// Keeps alive what the transports use, for factories that return only transports.
class Keeping final : public Transport {
 public:
  Keeping(std::shared_ptr<DeviceRanks> ranks, std::size_t rank)
      : ranks_(std::move(ranks)), inner_(synchronized(std::move(ranks_->transports[rank]))) {}
  void begin_step(const StepInfo& info) override { inner_->begin_step(info); }
  EventPtr send(Rank to, const MessageId& id, Message message, const EventPtr& ready) override {
    return inner_->send(to, id, std::move(message), ready);
  }
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override {
    return inner_->receive(from, id);
  }
  void end_step() override { inner_->end_step(); }
  void abort(const Failure& failure) noexcept override { inner_->abort(failure); }
  void recover() override { inner_->recover(); }

 private:
  const std::shared_ptr<DeviceRanks> ranks_;
  const std::unique_ptr<Transport> inner_;
};

std::vector<std::unique_ptr<Transport>> synchronized_ranks(LinkKind kind, int num_ranks) {
  const auto ranks = std::make_shared<DeviceRanks>(
      kind, num_ranks, DeviceRankOptions{.dynamic_shapes = true, .timeout = 5s});
  ranks->connect();
  std::vector<std::unique_ptr<Transport>> transports;
  for (int rank = 0; rank < num_ranks; ++rank) {
    transports.push_back(std::make_unique<Keeping>(ranks, static_cast<std::size_t>(rank)));
  }
  return transports;
}

class DeviceConformance
    : public ::testing::TestWithParam<std::tuple<LinkKind, conformance::Check>> {};

TEST_P(DeviceConformance, Holds) {
  const auto& [kind, check] = GetParam();
  check.run([kind = kind](int num_ranks) { return synchronized_ranks(kind, num_ranks); });
}

// A message has left only when the device has finished, which may be after the step: see
// DeviceTransport.KeepsWhatIsSentUntilItHasLeft.
std::vector<conformance::Check> device_checks() {
  std::vector<conformance::Check> checks = conformance::checks();
  std::erase_if(checks, [](const auto& check) { return check.name == "ReleasesSentMessages"; });
  return checks;
}

constexpr LinkKind kLinks[] = {LinkKind::kNccl, LinkKind::kCopy, LinkKind::kCopyInSharedQueues};

INSTANTIATE_TEST_SUITE_P(Threads, DeviceConformance,
                         ::testing::Combine(::testing::ValuesIn(kLinks),
                                            ::testing::ValuesIn(device_checks())),
                         [](const auto& info) {
                           return to_string(std::get<0>(info.param)) + std::get<1>(info.param).name;
                         });

class DeviceTransport : public ::testing::TestWithParam<LinkKind> {};

INSTANTIATE_TEST_SUITE_P(Over, DeviceTransport, ::testing::ValuesIn(kLinks),
                         [](const auto& info) { return to_string(info.param); });

TEST_P(DeviceTransport, ReadsAndWritesInTheOrderOfEvents) {
  DeviceRanks ranks(GetParam(), 2);
  for (int step = 1; step <= 4; ++step) {
    step_over_streams(ranks, step, 1, {bytes_spec(1000), bytes_spec(24)}, 8);
  }
}

TEST_P(DeviceTransport, NothingWaitsForTheDevice) {
  DeviceRanks ranks(GetParam(), 2);
  ranks.connect();
  std::latch issued(2);
  run_ranks(2, [&](int rank) {
    Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
    FakeDevice& device = *ranks.devices[static_cast<std::size_t>(rank)];
    // No device does anything before both hosts have finished the step.
    device.compute().launch([&] { issued.wait(); });
    transport.begin_step(shaped_step(1, rank, 1));
    const Rank peer(1 - rank);
    auto receive = transport.receive(peer, gradient(0));
    transport.send(peer, gradient(0), make_message({bytes_spec(64)}, 5), device.compute().record());
    const Message message = take(*receive, device);
    transport.end_step();
    issued.count_down();
    device.compute().record()->synchronize();
    EXPECT_TRUE(has_pattern(message, {bytes_spec(64)}, 5));
  });
}

TEST_P(DeviceTransport, MirrorsAreReadByTheirReductionStreamAlone) {
  for (const MessageKind kind : {MessageKind::kMirrorLow, MessageKind::kMirrorHigh}) {
    DeviceRanks ranks(GetParam(), 2);
    ranks.connect();
    std::latch summed(2);
    run_ranks(2, [&](int rank) {
      Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
      FakeDevice& device = *ranks.devices[static_cast<std::size_t>(rank)];
      // All other streams are busy all the while, which must not delay the sums.
      FakeStream& own = device.reduction(reduction_of(kind));
      FakeStream& other = device.reduction(1 - reduction_of(kind));
      for (FakeStream* busy : {&device.compute(), &other}) busy->launch([&] { summed.wait(); });
      const MessageId id{kind, Stage(0), Microbatch(0)};
      for (std::int64_t step = 1; step <= 4; ++step) {
        const Layout layout{bytes_spec(64 * (1 + step % 2))};  // gradients may come and go
        transport.begin_step(shaped_step(step, rank, 1));
        auto receive = transport.receive(Rank(1 - rank), id);
        const EventPtr left = transport.send(Rank(1 - rank), id, make_message(layout, 5), nullptr);
        Arrival arrival = receive->wait();
        own.wait(arrival.ready);
        std::atomic<bool> is_right{false};
        own.launch([&, message = arrival.message] { is_right = has_pattern(message, layout, 5); });
        own.wait(left);
        own.record()->synchronize();
        EXPECT_TRUE(is_right);
        transport.end_step();
      }
      summed.count_down();
      for (FakeStream* busy : {&device.compute(), &other}) busy->record()->synchronize();
    });
  }
}

TEST_P(DeviceTransport, DescribesMessagesInTheFirstStepOfAKindAlone) {
  DeviceRanks ranks(GetParam(), 2);
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

TEST_P(DeviceTransport, AShapeThatNobodyCouldForeseeIsTheUsersToDeclare) {
  DeviceRanks ranks(GetParam(), 2);
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

TEST_P(DeviceTransport, KeepsWhatIsSentUntilItHasLeft) {
  DeviceRanks ranks(GetParam(), 2);
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
      transport.send(Rank(1), activation(0), std::move(message), device.compute().record());
    } else {
      (void)transport.receive(Rank(0), activation(0))->wait().message;
    }
    transport.end_step();
  });
  EXPECT_FALSE(sent.expired());
  may_send.count_down();
  while (ranks.transports[0]->busy()) std::this_thread::sleep_for(1ms);
  step_over_streams(ranks, 2, 1, {bytes_spec(64)}, 1);
  EXPECT_TRUE(sent.expired());
}

TEST_P(DeviceTransport, AllocatesNothingInTheSteadyState) {
  DeviceRanks ranks(GetParam(), 2);
  step_over_streams(ranks, 1, 1, {bytes_spec(60'000)}, 20);
  step_over_streams(ranks, 2, 1, {bytes_spec(60'000)}, 20);
  const int before = ranks.num_allocations();
  for (int step = 3; step < 10; ++step) {
    step_over_streams(ranks, step, 1, {bytes_spec(60'000)}, 20);
  }
  EXPECT_EQ(ranks.num_allocations(), before);
}

// Faults

TEST_P(DeviceTransport, APeerThatNeverComesEndsInAnErrorInTime) {
  DeviceRanks ranks(GetParam(), 2, {.timeout = 200ms});
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

TEST_P(DeviceTransport, APeerThatIsGoneIsNamed) {
  DeviceRanks ranks(GetParam(), 2);
  ranks.connect();
  std::thread other([&] { ranks.transports[1]->begin_step(shaped_step(1, 1, 1)); });
  ranks.transports[0]->begin_step(shaped_step(1, 0, 1));
  other.join();
  ranks.transports[0]->send(Rank(1), activation(0), make_message({bytes_spec(8)}, 0), nullptr);
  ranks.transports[1].reset();
  std::optional<std::string> fault;
  while (!fault) fault = ranks.transports[0]->fault();  // none while the link's thread has the lock
  EXPECT_NE(fault->find("rank 1"), std::string::npos) << *fault;
}

// All hosts have finished the step, and one rank leaves while other ranks' devices still work.
TEST_P(DeviceTransport, ARankThatIsThroughMayGo) {
  DeviceRanks ranks(GetParam(), 3);
  std::latch may_send(1);
  std::atomic<bool> is_right{false};
  run_ranks(3, [&](int rank) {
    Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
    FakeDevice& device = *ranks.devices[static_cast<std::size_t>(rank)];
    transport.begin_step(shaped_step(1, rank, 1));
    if (rank == 1) {
      device.compute().launch([&] { may_send.wait(); });
      transport.send(Rank(2), activation(0), make_message({bytes_spec(64)}, 5),
                     device.compute().record());
    }
    if (rank == 2) {
      const Message message = take(*transport.receive(Rank(1), activation(0)), device);
      device.compute().launch(
          [&, message] { is_right = has_pattern(message, {bytes_spec(64)}, 5); });
    }
    transport.end_step();
  });
  ranks.transports[0].reset();
  for (const std::size_t rank : {1, 2}) {
    EXPECT_EQ(ranks.transports[rank]->fault(), std::nullopt) << "rank " << rank;
  }
  may_send.count_down();
  ranks.devices[2]->compute().record()->synchronize();
  EXPECT_TRUE(is_right);
}

// Python's garbage collector may destroy a pipeline while another one is issuing a step.
TEST_P(DeviceTransport, OneThatIsNobodysEndsBetweenTheStepsOfAnother) {
  DeviceRanks old(GetParam(), 2);
  old.connect();
  DeviceRanks ranks(GetParam(), 2);
  const std::weak_ptr<Device> device = old.devices[1];
  step_over_streams(ranks, 1, 1, {bytes_spec(8)}, 1);
  run_ranks(2, [&](int rank) {
    Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
    transport.begin_step(shaped_step(2, rank, 1));
    if (rank == 1) {
      old.transports[1].reset();
      old.devices[1].reset();
      EXPECT_FALSE(device.expired()) << "what frees its memory may wait for this step";
    }
    transport.end_step();
  });
  EXPECT_TRUE(device.expired());
}

// Step 1, in which the device of rank 0 sends to rank 1 once it may. Returns what rank 1 receives.
Message step_of_a_late_message(DeviceRanks& ranks, std::latch& may_send) {
  Message got;
  run_ranks(static_cast<int>(ranks.transports.size()), [&](int rank) {
    Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
    FakeDevice& device = *ranks.devices[static_cast<std::size_t>(rank)];
    transport.begin_step(shaped_step(1, rank, 1));
    if (rank == 0) {
      device.compute().launch([&] { may_send.wait(); });
      transport.send(Rank(1), activation(0), make_message({bytes_spec(64)}, 1),
                     device.compute().record());
    } else if (rank == 1) {
      got = take(*transport.receive(Rank(0), activation(0)), device);
    }
    transport.end_step();
  });
  return got;
}

// The step has returned, and an update by what is still under way may have been issued.
TEST_P(DeviceTransport, AFailureLetsEarlierStepsFinish) {
  std::latch may_send(1);  // first: a stream waits for it
  DeviceRanks ranks(GetParam(), 3);
  ranks.connect();
  const Message got = step_of_a_late_message(ranks, may_send);
  run_ranks(3, [&](int rank) {
    Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
    transport.begin_step(shaped_step(2, rank, 1));
    if (rank == 1) (void)transport.receive(Rank(2), activation(1));
  });
  const Failure failure{Rank(2), 2, "step 2 failed"};
  ranks.transports[2]->abort(failure);  // nothing of an earlier step holds it up
  bool is_told = false;
  try {
    ranks.transports[1]->send(Rank(2), activation(2), make_message({bytes_spec(8)}, 0), nullptr);
    is_told = ranks.transports[1]->fault().has_value();
  } catch (const PipelineError&) {
    is_told = true;
  }
  EXPECT_TRUE(is_told);
  std::thread late([&] {
    std::this_thread::sleep_for(50ms);
    may_send.count_down();
  });
  run_ranks(2, [&](int rank) { ranks.transports[static_cast<std::size_t>(rank)]->abort(failure); });
  late.join();
  ranks.devices[1]->compute().record()->synchronize();
  EXPECT_TRUE(has_pattern(got, {bytes_spec(64)}, 1));
}

// A rank that is gone takes its messages along; an abort does not wait for them for long.
TEST_P(DeviceTransport, AFailureDoesNotWaitForEarlierStepsForEver) {
  std::latch may_send(1);  // first: a stream waits for it
  DeviceRanks ranks(GetParam(), 2);
  ranks.connect();
  (void)step_of_a_late_message(ranks, may_send);
  const auto start = std::chrono::steady_clock::now();
  ranks.transports[1]->abort({Rank(0), 2, "rank 0 is stuck"});
  EXPECT_LT(std::chrono::steady_clock::now() - start, 10s);
  ranks.devices[1]->compute().record()->synchronize();
  may_send.count_down();
}

// What is put off until the end of a step must not be kept forever.
TEST_P(DeviceTransport, AStepThatHasFailedIsOver) {
  DeviceRanks ranks(GetParam(), 2);
  run_ranks(2, [&](int rank) {
    Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
    transport.begin_step(shaped_step(1, rank, 1));
    transport.abort({Rank(0), 1, "rank 0 gave up"});
    transport.recover();
  });
  auto connection = std::make_shared<int>();
  const std::weak_ptr<int> seen = connection;
  let_go_between_steps(std::move(connection));
  EXPECT_TRUE(seen.expired());
}

TEST_P(DeviceTransport, AnAbortEndsWhatTheDeviceWaitsFor) {
  DeviceRanks ranks(GetParam(), 2);
  ranks.connect();
  std::thread other([&] { ranks.transports[1]->begin_step(shaped_step(1, 1, 1)); });
  ranks.transports[0]->begin_step(shaped_step(1, 0, 1));
  other.join();
  Message message = make_message({bytes_spec(8)}, 0);
  ranks.transports[0]->send(Rank(1), activation(0), std::move(message), nullptr);
  ranks.transports[0]->abort({Rank(1), 1, "rank 1 gave up"});
  EXPECT_EQ(text_of<PipelineError>([&] { ranks.transports[0]->end_step(); }), "rank 1 gave up");
}

}  // namespace
}  // namespace dualpipe
