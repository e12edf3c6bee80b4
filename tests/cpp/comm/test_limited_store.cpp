#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <optional>
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
using Clock = std::chrono::steady_clock;

TEST(LimitedStore, IsTheStoreThatItStandsFor) {
  SharedStore store;
  const auto limited = limited_store(store.open(), 10s);
  limited->set("a", "1");
  limited->set_first("a", "2");
  EXPECT_EQ(limited->get("a"), "1");
  EXPECT_EQ(limited->add("n", 3), 3);
  EXPECT_EQ(limited->add("n", 4), 7);
  EXPECT_TRUE(limited->has({"a", "n"}));
  limited->remove("a");
  EXPECT_FALSE(limited->has({"a"}));
  store.kill();
  EXPECT_EQ(text_of<PipelineError>([&] { (void)limited->has({"n"}); }), "the store is gone");
}

TEST(LimitedStore, EndsCallsThatNobodyAnswers) {
  SharedStore store;
  const auto limited = limited_store(store.open(), 200ms);
  store.freeze();
  const auto start = Clock::now();
  const std::string text = text_of<NoAnswer>([&] { (void)limited->has({"a"}); });
  EXPECT_GE(Clock::now() - start, 200ms);
  EXPECT_NE(text.find("has not answered for 0.2 s"), std::string::npos) << text;
  const auto again = Clock::now();
  for (int i = 0; i < 20; ++i) EXPECT_THROW((void)limited->has({"a"}), NoAnswer);
  EXPECT_LT(Clock::now() - again, 20 * 200ms / 2) << "who has been silent is not waited for again";
  store.thaw();
}

TEST(LimitedStore, WhatIsWrittenArrivesWhenTheStoreGoesOn) {
  SharedStore store;
  const auto limited = limited_store(store.open(), 200ms);
  store.freeze();
  EXPECT_THROW((void)limited->get("no such key"), NoAnswer);
  EXPECT_THROW(limited->set("a", "1"), NoAnswer);
  store.thaw();
  const auto other = store.open();
  while (!other->has({"a"})) std::this_thread::sleep_for(1ms);
  while (true) {  // once an answer has come, it waits longer again
    try {
      EXPECT_EQ(limited->get("a"), "1");
      break;
    } catch (const NoAnswer&) {
    }
  }
}

TEST(LimitedStore, DoesNotWaitAtItsEnd) {
  SharedStore store;
  auto limited = limited_store(store.open(), 5s);
  auto silent = limited_store(store.open(), 100ms);
  limited->set("a", "1");
  store.freeze();
  EXPECT_THROW((void)silent->has({"a"}), NoAnswer);
  const auto start = Clock::now();
  limited.reset();
  silent.reset();
  EXPECT_LT(Clock::now() - start, 2s);
  store.thaw();
}

TEST(LimitedStore, NoNewsOfASilentStoreIsNoFailure) {
  SharedStore store;
  auto plane = store_control_plane(limited_store(store.open(), 20ms), Rank(0), 2);
  store.freeze();
  EXPECT_EQ(plane->poll(), std::nullopt);
  plane->publish_position("somewhere");
  EXPECT_EQ(plane->positions(), (std::vector<std::string>{"", ""}));
  plane->report({Rank(0), 1, "a failure"});
  store.thaw();
  std::optional<Failure> found;
  while (!found) found = plane->poll();
  EXPECT_EQ(found->text, "a failure");
}

TEST(LimitedStore, WhatWasWrittenArrivesAfterItsEnd) {
  SharedStore store;
  auto limited = limited_store(store.open(), 50ms);
  store.freeze();
  EXPECT_THROW(limited->set("a", "1"), NoAnswer);
  limited.reset();
  store.thaw();
  const auto other = store.open();
  while (!other->has({"a"})) std::this_thread::sleep_for(1ms);
}

}  // namespace
}  // namespace dualpipe
