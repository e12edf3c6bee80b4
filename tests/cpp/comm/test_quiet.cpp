#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <latch>
#include <memory>
#include <optional>
#include <thread>

#include "comm/quiet.h"

namespace dualpipe {
namespace {

using namespace std::chrono_literals;

// A connection that calls `end` when it is released.
std::shared_ptr<void> connection(std::function<void()> end) {
  return {new int, [end = std::move(end)](int* number) {
            delete number;
            end();
          }};
}

TEST(Quiet, EndsAtOnceWithoutSteps) {
  bool is_gone = false;
  let_go_between_steps(connection([&] { is_gone = true; }));
  EXPECT_TRUE(is_gone);
}

TEST(Quiet, EndsWithTheLastStep) {
  bool is_gone = false;
  std::optional<StepUnderWay> one(std::in_place);
  std::optional<StepUnderWay> two(std::in_place);
  let_go_between_steps(connection([&] { is_gone = true; }));
  one.reset();
  EXPECT_FALSE(is_gone);
  two.reset();
  EXPECT_TRUE(is_gone);
}

TEST(Quiet, AnEndMayAddAnother) {
  bool is_gone = false;
  {
    const StepUnderWay step;
    let_go_between_steps(
        connection([&] { let_go_between_steps(connection([&] { is_gone = true; })); }));
  }
  EXPECT_TRUE(is_gone);
  let_go_between_steps(connection([&] { is_gone = false; }));
  EXPECT_FALSE(is_gone) << "the first ones are through";
}

TEST(Quiet, NoStepBeginsWithinAnEnd) {
  std::latch ends(1);
  std::atomic<bool> has_ended{false};
  std::thread other([&] {
    let_go_between_steps(connection([&] {
      ends.count_down();
      std::this_thread::sleep_for(100ms);
      has_ended = true;
    }));
  });
  ends.wait();
  const StepUnderWay step;
  EXPECT_TRUE(has_ended);
  other.join();
}

}  // namespace
}  // namespace dualpipe
