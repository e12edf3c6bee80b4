#include <gtest/gtest.h>

#include <thread>

#include "engine/pipeline.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;

TEST(SteadyState, TwoPipelinesLiveInOneProcess) {
  EnginePipeline one(4);
  EnginePipeline other(2);
  AffineJob dual(one, "dualpipe", 8);
  AffineJob linear(other, "zb1p", 6);
  std::thread beside([&] {
    for (int step = 0; step < 50; ++step) expect_all_ok(linear.step());
  });
  for (int step = 0; step < 50; ++step) expect_all_ok(dual.step());
  beside.join();
  EXPECT_EQ(dual.results(), unsplit(dual.lowered().placement));
  EXPECT_EQ(linear.results(), unsplit(linear.lowered().placement));
}

TEST(SteadyState, TwoPipelinesShareTheThreadsOfTheRanks) {
  EnginePipeline one(2);
  EnginePipeline other(2);
  AffineJob dual(one, "dualpipe", 4);
  AffineJob linear(other, "1f1b", 4);
  expect_all_ok(one.on_all([&](Engine& engine) {
    for (int step = 0; step < 50; ++step) {
      dual.step_on(engine);
      linear.step_on(other.engine(engine.rank().value()));
    }
  }));
  EXPECT_EQ(dual.results(), unsplit(dual.lowered().placement));
  EXPECT_EQ(linear.results(), unsplit(linear.lowered().placement));
}

TEST(SteadyState, OnePipelineRunsSchedulesInTurn) {
  EnginePipeline pipeline(4);
  AffineJob training(pipeline, "dualpipe", 8);
  LoweringOptions inference;
  inference.with_backward = false;
  AffineJob evaluation(pipeline, "dualpipe", 10, inference);
  for (int round = 0; round < 10; ++round) {
    expect_all_ok(evaluation.step());
    EXPECT_EQ(evaluation.results(), unsplit(evaluation.lowered().placement, false));
    expect_all_ok(training.step());
    EXPECT_EQ(training.results(), unsplit(training.lowered().placement));
  }
}

TEST(SteadyState, AThousandStepsTakeNoMoreMemory) {
  EnginePipeline pipeline(4);
  AffineJob job(pipeline, "dualpipe", 8);
  BufferPool::Statistics early;
  for (int hundred = 0; hundred < 10; ++hundred) {
    expect_all_ok(pipeline.on_all([&](Engine& engine) {
      for (int step = 0; step < 100; ++step) job.step_on(engine);
    }));
    const BufferPool::Statistics now = pipeline.hub().memory();
    EXPECT_EQ(now.bytes_in_use, 0u);
    if (hundred == 0) early = now;
    // Never more than if all messages of a step were in transit at once.
    EXPECT_LE(now.num_allocations, 4u * 8 * 6);
    EXPECT_EQ(now.bytes_allocated,
              now.num_allocations * early.bytes_allocated / early.num_allocations);
  }
  EXPECT_EQ(job.results(), unsplit(job.lowered().placement));
  EXPECT_EQ(pipeline.engine(0).num_steps(), 1000);
}

}  // namespace
}  // namespace dualpipe
