#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "comm/conformance.h"
#include "comm/harness.h"
#include "comm/loopback.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

std::vector<std::unique_ptr<Transport>> make_transports(const std::shared_ptr<LoopbackHub>& hub,
                                                        int num_ranks) {
  std::vector<std::unique_ptr<Transport>> transports;
  for (int rank = 0; rank < num_ranks; ++rank) transports.push_back(hub->transport(Rank(rank)));
  return transports;
}

class LoopbackConformance
    : public ::testing::TestWithParam<std::tuple<conformance::Check, LinkOptions>> {};

TEST_P(LoopbackConformance, Holds) {
  const auto& [check, link] = GetParam();
  check.run([&link = link](int num_ranks) {
    return make_transports(LoopbackHub::create(num_ranks, link), num_ranks);
  });
}

INSTANTIATE_TEST_SUITE_P(Links, LoopbackConformance,
                         ::testing::Combine(::testing::ValuesIn(conformance::checks()),
                                            ::testing::Values(LinkOptions{},
                                                              LinkOptions{100us, 1e9})),
                         [](const auto& info) {
                           const bool slow = std::get<1>(info.param).latency.count() > 0;
                           return std::get<0>(info.param).name + (slow ? "OnASlowLink" : "");
                         });

// Time from the first send to the arrival of `count` messages of `num_bytes`.
Clock::duration time_transfer(LinkOptions link, int count, std::uint64_t num_bytes) {
  auto hub = LoopbackHub::create(2, link);
  auto transports = make_transports(hub, 2);
  run_ranks(2,
            [&](int rank) { transports[static_cast<std::size_t>(rank)]->begin_step(step_info()); });
  const auto start = Clock::now();
  for (int i = 0; i < count; ++i) {
    transports[0]->send(Rank(1), activation(i), make_message({bytes_spec(num_bytes)}, 0), nullptr);
  }
  for (int i = 0; i < count; ++i)
    (void)transports[1]->receive(Rank(0), activation(i))->wait().message;
  return Clock::now() - start;
}

TEST(LoopbackLink, LatencyDelaysEachMessageOnce) {
  auto fastest = Clock::duration::max();  // other work on the machine delays some
  for (int i = 0; i < 3; ++i) {
    const auto elapsed = time_transfer({20ms, 0}, 5, 64);
    EXPECT_GE(elapsed, 20ms);
    fastest = std::min(fastest, elapsed);
  }
  EXPECT_LT(fastest, 100ms);  // all five overlap
}

TEST(LoopbackLink, BandwidthAddsUp) {
  const auto elapsed = time_transfer({0ns, 1e6}, 5, 6400);  // 6.4 ms each
  EXPECT_GE(elapsed, 32ms);
}

TEST(LoopbackFaults, FailThrowsInTheSender) {
  auto hub = LoopbackHub::create(2);
  auto transports = make_transports(hub, 2);
  hub->inject([](Rank, Rank, const MessageId& id) {
    return id.microbatch == Microbatch(1) ? Fault::kFail : Fault::kNone;
  });
  transports[0]->begin_step(step_info());
  transports[0]->send(Rank(1), activation(0), make_message({}, 0), nullptr);
  const std::string text = text_of<PipelineError>(
      [&] { transports[0]->send(Rank(1), activation(1), make_message({}, 0), nullptr); });
  EXPECT_EQ(text,
            "rank 0 -> rank 1: the link failed on the activation of micro-batch 1 for stage 1");
}

TEST(LoopbackFaults, DropLosesTheMessage) {
  auto hub = LoopbackHub::create(2);
  auto transports = make_transports(hub, 2);
  hub->inject([](Rank, Rank to, const MessageId& id) {
    return to == Rank(1) && id.microbatch == Microbatch(0) ? Fault::kDrop : Fault::kNone;
  });
  transports[0]->begin_step(step_info());
  transports[1]->begin_step(step_info());
  transports[0]->send(Rank(1), activation(0), make_message({}, 0), nullptr);
  transports[0]->send(Rank(1), activation(1), make_message({}, 0), nullptr);
  auto receive = transports[1]->receive(Rank(0), activation(0));
  const std::string text = text_of<PipelineError>([&] { (void)receive->wait().message; });
  EXPECT_NE(text.find("expected the activation of micro-batch 0"), std::string::npos) << text;
}

TEST(LoopbackHub, RefusesWhatDoesNotExist) {
  EXPECT_THROW((void)LoopbackHub::create(0), UserError);
  auto hub = LoopbackHub::create(2);
  EXPECT_THROW((void)hub->transport(Rank(2)), UserError);
  auto transport = hub->transport(Rank(0));
  EXPECT_THROW((void)hub->transport(Rank(0)), UserError);
  transport.reset();
  EXPECT_NO_THROW((void)hub->transport(Rank(0)));
}

TEST(LoopbackHub, TransportsOutliveTheHubAndEachOther) {
  auto hub = LoopbackHub::create(2);
  auto transports = make_transports(hub, 2);
  hub.reset();
  transports[0]->begin_step(step_info());
  transports[1]->begin_step(step_info());
  transports[0]->send(Rank(1), activation(0), make_message({bytes_spec(8)}, 3), nullptr);
  transports[0].reset();
  const Message message = transports[1]->receive(Rank(0), activation(0))->wait().message;
  transports.clear();
  EXPECT_TRUE(has_pattern(message, {bytes_spec(8)}, 3));
}

TEST(LoopbackHub, AllGatherExchangesTexts) {
  auto hub = LoopbackHub::create(3);
  run_ranks(3, [&](int rank) {
    for (int round = 0; round < 20; ++round) {
      const auto texts = hub->all_gather(Rank(rank), cat(rank, ":", round), 5s);
      ASSERT_EQ(texts.size(), 3u);
      for (int other = 0; other < 3; ++other) {
        EXPECT_EQ(texts[static_cast<std::size_t>(other)], cat(other, ":", round));
      }
    }
  });
}

TEST(LoopbackHub, AllGatherNamesWhoIsMissing) {
  auto hub = LoopbackHub::create(4);
  std::vector<std::string> texts(4);
  run_ranks(2, [&](int rank) {
    texts[static_cast<std::size_t>(rank)] =
        text_of<PipelineError>([&] { (void)hub->all_gather(Rank(2 * rank), "here", 50ms); });
  });
  EXPECT_NE(texts[0].find(" waited 0.05 s for rank(s) 1, 3 of 4"), std::string::npos) << texts[0];
  EXPECT_EQ(texts[1], texts[0]);
  const std::string late =
      text_of<PipelineError>([&] { (void)hub->all_gather(Rank(1), "here", 5s); });
  EXPECT_EQ(late, texts[0]);
}

TEST(LoopbackHub, AllGatherEndsWithAReportedFailure) {
  auto hub = LoopbackHub::create(2);
  hub->control_plane(Rank(1))->report({Rank(1), 0, "rank 1: no such file"});
  EXPECT_EQ(text_of<PipelineError>([&] { (void)hub->all_gather(Rank(0), "here", 60s); }),
            "rank 1: no such file");
}

TEST(LoopbackControlPlane, FirstReportOfAnEpochWins) {
  auto hub = LoopbackHub::create(2);
  auto zero = hub->control_plane(Rank(0));
  auto one = hub->control_plane(Rank(1));
  EXPECT_FALSE(one->poll().has_value());
  zero->report({Rank(0), 7, "first"});
  one->report({Rank(1), 7, "second"});
  ASSERT_TRUE(one->poll().has_value());
  EXPECT_EQ(one->poll()->text, "first");
  EXPECT_EQ(one->poll()->rank, Rank(0));
  EXPECT_EQ(one->poll()->step, 7);

  one->advance_epoch();  // one has raised it, zero has not yet
  EXPECT_FALSE(one->poll().has_value());
  EXPECT_TRUE(zero->poll().has_value());
  one->report({Rank(1), 8, "third"});
  zero->advance_epoch();
  EXPECT_EQ(zero->poll()->text, "third");
}

TEST(LoopbackControlPlane, PositionsAreOfThisEpoch) {
  auto hub = LoopbackHub::create(2);
  auto zero = hub->control_plane(Rank(0));
  auto one = hub->control_plane(Rank(1));
  one->publish_position("action 3");
  EXPECT_EQ(zero->positions(), (std::vector<std::string>{"", "action 3"}));
  zero->advance_epoch();
  EXPECT_EQ(zero->positions(), (std::vector<std::string>{"", ""}));
}

}  // namespace
}  // namespace dualpipe
