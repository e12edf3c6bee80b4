#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "common/error.h"
#include "engine/weight_queue.h"

namespace dualpipe {
namespace {

constexpr Stage kStage(3);

TEST(WeightQueue, RunsTheTasksOfOneWFirstInFirstOut) {
  WeightQueue queue;
  std::vector<int> order;
  for (int microbatch : {5, 1}) {
    queue.begin_backward(kStage, Microbatch(microbatch), true);
    for (int i = 0; i < 3; ++i) {
      queue.put([&order, microbatch, i] { order.push_back(10 * microbatch + i); });
    }
    queue.end_backward();
  }
  EXPECT_EQ(queue.num_pending(), 6u);
  EXPECT_TRUE(order.empty());
  queue.run(kStage, Microbatch(1));
  EXPECT_EQ(order, (std::vector{10, 11, 12}));
  EXPECT_EQ(queue.num_pending(), 3u);
  queue.run(kStage, Microbatch(5));
  EXPECT_EQ(order, (std::vector{10, 11, 12, 50, 51, 52}));
  EXPECT_EQ(queue.num_pending(), 0u);
}

TEST(WeightQueue, TellsWhatIsFinalAsItGoes) {
  const int up = 0;
  const int down = 0;
  const int norm = 0;
  WeightQueue queue;
  queue.begin_backward(kStage, Microbatch(0), true);
  queue.put([] {}, {&down});
  queue.put([] {}, {&up, &down});  // a tied weight
  queue.put([] {}, {&up});
  queue.end_backward();
  std::vector<std::vector<bool>> pending;
  queue.run(kStage, Microbatch(0), [&](const PendingWeights& now) {
    pending.push_back({now.contains(&up), now.contains(&down), now.contains(&norm)});
  });
  EXPECT_EQ(pending, (std::vector<std::vector<bool>>{{true, true, false}, {true, false, false}}));
}

TEST(WeightQueue, TellsNothingOfTasksWithUnknownTargets) {
  const int weight = 0;
  WeightQueue queue;
  queue.begin_backward(kStage, Microbatch(0), true);
  queue.put([] {});
  queue.put([] {}, {&weight});
  queue.put([] {}, {&weight});
  queue.end_backward();
  int num_calls = 0;
  queue.run(kStage, Microbatch(0), [&](const PendingWeights&) { ++num_calls; });
  EXPECT_EQ(num_calls, 0);
}

TEST(WeightQueue, KeepsStagesApart) {
  WeightQueue queue;
  int ran = 0;
  queue.begin_backward(Stage(0), Microbatch(1), true);
  queue.put([&ran] { ++ran; });
  queue.end_backward();
  queue.run(Stage(7), Microbatch(1));
  EXPECT_EQ(ran, 0);
  queue.run(Stage(0), Microbatch(1));
  queue.run(Stage(0), Microbatch(1));  // nothing left
  EXPECT_EQ(ran, 1);
}

TEST(WeightQueue, DefersOnlyInABackwardForInputs) {
  WeightQueue queue;
  EXPECT_FALSE(queue.deferring());
  EXPECT_THROW(queue.put([] {}), InternalError);

  queue.begin_backward(kStage, Microbatch(0), false);
  EXPECT_FALSE(queue.deferring());
  EXPECT_THROW(queue.put([] {}), InternalError);
  queue.end_backward();

  queue.begin_backward(kStage, Microbatch(0), true);
  EXPECT_TRUE(queue.deferring());
  queue.end_backward();
  EXPECT_FALSE(queue.deferring());
  EXPECT_THROW(queue.put([] {}), InternalError);
  EXPECT_EQ(queue.num_pending(), 0u);
}

TEST(WeightQueue, LetsGoOfEachTaskOnceItRan) {
  WeightQueue queue;
  auto saved = std::make_shared<int>(1);
  std::weak_ptr<int> watch = saved;
  queue.begin_backward(kStage, Microbatch(0), true);
  queue.put([kept = std::move(saved)] {});
  bool gone_at_next_task = false;
  queue.put([&] { gone_at_next_task = watch.expired(); });
  queue.end_backward();
  queue.run(kStage, Microbatch(0));
  EXPECT_TRUE(gone_at_next_task);
}

TEST(WeightQueue, ClearForgetsTasksAndTheBackwardAtWork) {
  WeightQueue queue;
  auto saved = std::make_shared<int>(1);
  std::weak_ptr<int> watch = saved;
  queue.begin_backward(kStage, Microbatch(0), true);
  queue.put([kept = std::move(saved)] { ADD_FAILURE() << "a cleared task ran"; });
  queue.clear();
  EXPECT_TRUE(watch.expired());
  EXPECT_FALSE(queue.deferring());
  queue.run(kStage, Microbatch(0));
}

TEST(WeightQueue, ATaskThatThrowsLeavesTheOthersOut) {
  WeightQueue queue;
  queue.begin_backward(kStage, Microbatch(0), true);
  queue.put([] { throw UserError("no gradient"); });
  queue.put([] { ADD_FAILURE() << "ran behind a task that threw"; });
  queue.end_backward();
  EXPECT_THROW(queue.run(kStage, Microbatch(0)), UserError);
  EXPECT_EQ(queue.num_pending(), 0u);
}

}  // namespace
}  // namespace dualpipe
