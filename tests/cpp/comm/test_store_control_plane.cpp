#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "comm/harness.h"
#include "comm/limited_store.h"
#include "comm/memory_link.h"
#include "comm/store_control_plane.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

TEST(StoreControlPlane, FirstReportOfAnEpochWins) {
  SharedStore store;
  auto zero = store_control_plane(store.open(), Rank(0), 2);
  auto one = store_control_plane(store.open(), Rank(1), 2);
  EXPECT_FALSE(one->poll().has_value());
  one->report({Rank(1), -3, "rank 1: bad\nsecond line"});
  zero->report({Rank(0), 7, "too late"});
  ASSERT_TRUE(zero->poll().has_value());
  EXPECT_EQ(zero->poll()->rank, Rank(1));
  EXPECT_EQ(zero->poll()->step, -3);
  EXPECT_EQ(zero->poll()->text, "rank 1: bad\nsecond line");
  zero->advance_epoch();
  EXPECT_FALSE(zero->poll().has_value());
  EXPECT_TRUE(one->poll().has_value());
}

TEST(StoreControlPlane, PositionsAreOfThisEpoch) {
  SharedStore store;
  auto zero = store_control_plane(store.open(), Rank(0), 2);
  auto one = store_control_plane(store.open(), Rank(1), 2);
  one->publish_position("action 3");
  one->publish_position("action 4");
  EXPECT_EQ(zero->positions(), (std::vector<std::string>{"", "action 4"}));
  zero->advance_epoch();
  EXPECT_EQ(zero->positions(), (std::vector<std::string>{"", ""}));
}

TEST(StoreControlPlane, AStoreThatIsGoneIsAPipelineError) {
  SharedStore store;
  auto plane = store_control_plane(store.open(), Rank(0), 1);
  store.kill();
  EXPECT_THROW((void)plane->poll(), PipelineError);
}

TEST(StoreExchange, ManyRoundsLeaveFewKeys) {
  SharedStore store;
  run_ranks(3, [&](int rank) {
    for (int round = 0; round < 20; ++round) {  // a new object each time: the rounds' numbers go on
      StoreExchange exchange(store.open(), Rank(rank), 3);
      const auto texts = exchange.all_gather(cat(rank, ":", round), 5s);
      ASSERT_EQ(texts.size(), 3u);
      for (int other = 0; other < 3; ++other) {
        EXPECT_EQ(texts[static_cast<std::size_t>(other)], cat(other, ":", round));
      }
    }
  });
  EXPECT_LE(store.num_keys(), 3u + 3u + 1u);  // counters, the last round and its outcome
}

TEST(StoreExchange, NamesWhoIsMissingOnEveryRank) {
  SharedStore store;
  std::vector<std::string> texts(2);
  run_ranks(2, [&](int rank) {
    StoreExchange exchange(store.open(), Rank(rank), 4);
    const auto timeout = rank == 0 ? 50ms : 60'000ms;  // the first to give up tells the other
    texts[static_cast<std::size_t>(rank)] =
        text_of<PipelineError>([&] { (void)exchange.all_gather("here", timeout); });
  });
  EXPECT_EQ(texts[0],
            "rank 0 waited 0.05 s for rank(s) 2, 3 of 4: start all ranks, or allow more time");
  EXPECT_EQ(texts[1], texts[0]);
}

TEST(StoreExchange, WhoComesLateFailsAsTheOthers) {
  SharedStore store;
  StoreExchange early(store.open(), Rank(0), 2);
  StoreExchange late(store.open(), Rank(1), 2);
  const std::string told = text_of<PipelineError>([&] { (void)early.all_gather("a", 10ms); });
  EXPECT_EQ(text_of<PipelineError>([&] { (void)late.all_gather("b", 5s); }), told);
  EXPECT_NE(told.find("for rank(s) 1 of 2"), std::string::npos) << told;
  std::vector<std::string> texts;  // the next exchange works again for all
  run_ranks(2, [&](int rank) {
    const auto found = (rank == 0 ? early : late).all_gather(cat(rank), 5s);
    if (rank == 1) texts = found;
  });
  EXPECT_EQ(texts, (std::vector<std::string>{"0", "1"}));
}

TEST(StoreExchange, EndsOnAllRanksWhenOneIsInterrupted) {
  SharedStore store;
  std::vector<std::string> texts(2);
  run_ranks(2, [&](int rank) {
    StoreExchange exchange(store.open(), Rank(rank), 3, [rank] { return rank == 1; });
    texts[static_cast<std::size_t>(rank)] =
        text_of<PipelineError>([&] { (void)exchange.all_gather("here", 60s); });
  });
  EXPECT_EQ(texts[0], "rank 1 was interrupted (Ctrl-C)");
  EXPECT_EQ(texts[1], texts[0]);
}

// Waits until a rank has counted its exchange and written its text.
void await_first_text(const SharedStore& store) {
  while (store.num_keys() < 2) std::this_thread::sleep_for(1ms);
}

TEST(StoreExchange, WaitsForAStoreThatIsSilentForAWhile) {
  SharedStore store;
  std::vector<std::string> texts;
  run_ranks(2, [&](int rank) {
    StoreExchange exchange(limited_store(store.open(), 300ms), Rank(rank), 2);
    if (rank == 0) {
      await_first_text(store);
      store.freeze();
      std::this_thread::sleep_for(900ms);
      store.thaw();
    }
    const auto found = exchange.all_gather(cat(rank), 20s);
    if (rank == 1) texts = found;
  });
  EXPECT_EQ(texts, (std::vector<std::string>{"0", "1"}));
}

TEST(StoreExchange, DoesNotWaitForASilentStoreForEver) {
  SharedStore store;
  StoreExchange exchange(limited_store(store.open(), 20ms), Rank(0), 2);
  std::thread freezes([&] {
    await_first_text(store);
    store.freeze();
  });
  EXPECT_THROW((void)exchange.all_gather("here", 1s), NoAnswer);
  freezes.join();
  store.thaw();
}

}  // namespace
}  // namespace dualpipe
