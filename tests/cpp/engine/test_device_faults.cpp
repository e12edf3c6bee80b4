#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "common/error.h"
#include "engine/pipeline.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

// Faults that no call sees: the watchdog finds them, and the step ends on every rank.
class DeviceFault : public ::testing::Test {
 protected:
  void expect_ended_by(const std::vector<Outcome>& outcomes, const std::string& text) {
    for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
      EXPECT_TRUE(outcomes[rank].is<PipelineError>()) << rank << ": " << outcomes[rank].text();
      EXPECT_NE(outcomes[rank].text().find(text), std::string::npos) << outcomes[rank].text();
    }
  }
  void expect_next_step_works() {
    pipeline.world().nccl.mend_network();
    job.stages(1).before = [](const Action&) {};
    expect_all_ok(job.step());
    EXPECT_EQ(job.results(), unsplit(job.lowered().placement));
  }

  static PipelineOptions options() {
    PipelineOptions options;
    options.over = Over::kNccl;
    return options;
  }

  EnginePipeline pipeline{2, options()};
  AffineJob job{pipeline, "dualpipe", 4};
};

TEST_F(DeviceFault, InTheMiddleOfAStep) {
  expect_all_ok(job.step());
  job.stages(1).before = [this](const Action&) {
    pipeline.world().nccl.break_network();
    std::this_thread::sleep_for(100ms);
  };
  expect_ended_by(job.step(), "the peer is gone");
  expect_next_step_works();
}

TEST_F(DeviceFault, WhileTheRanksMeet) {
  pipeline.world().nccl.fail("init_pair", NcclResult::kSystemError);
  expect_ended_by(job.step(), "cannot connect: NCCL says no");
  expect_next_step_works();
}

TEST_F(DeviceFault, AheadOfTheFirstStep) {
  pipeline.world().nccl.fail("init_pair", NcclResult::kSystemError);
  expect_ended_by(pipeline.on_all([](Engine& engine) { engine.connect(); }), "cannot connect");
  expect_all_ok(pipeline.on_all([](Engine& engine) { engine.connect(); }));
  expect_next_step_works();
}

// The device of one rank fails after the step has returned everywhere.
TEST_F(DeviceFault, AfterAStepEndsAllWhoSynchronize) {
  const auto synchronize = [](Engine& engine) { engine.synchronize(); };
  expect_all_ok(job.step());
  const std::size_t num_events = pipeline.engine(0).trace().events.size();
  expect_all_ok(pipeline.on_all(synchronize));
  EXPECT_EQ(pipeline.engine(0).trace().events.size(), num_events);
  pipeline.engine(1).transport().abort({Rank(1), 1, "rank 1: the peer is gone"});
  expect_ended_by(pipeline.on_all(synchronize), "the peer is gone");
  expect_next_step_works();
}

// Seen by the link's thread, which issues late sends, or by the thread that computes.
TEST(BrokenDevice, EndsAStepThatCopies) {
  PipelineOptions options;
  options.over = Over::kCopy;
  EnginePipeline pipeline(2, options);
  AffineJob job(pipeline, "dualpipe", 4);
  expect_all_ok(job.step());
  job.stages(1).before = [&](const Action&) { pipeline.world().copies.break_device(); };
  for (const Outcome& outcome : job.step()) {
    EXPECT_TRUE(outcome.is<PipelineError>()) << outcome.text();
    EXPECT_NE(outcome.text().find("the device says no to"), std::string::npos) << outcome.text();
  }
  pipeline.world().copies.mend_device();
  job.stages(1).before = [](const Action&) {};
  expect_all_ok(job.step());
  EXPECT_EQ(job.results(), unsplit(job.lowered().placement));
}

// Over NCCL, ranks wait for each other to begin: a late rank is noticed before a message is missed.
TEST(LateRank, IsNamedInTime) {
  PipelineOptions options;
  options.over = Over::kNccl;
  options.watchdog = {.poll_interval = 5ms, .timeout = 200ms};
  EnginePipeline pipeline(2, options);
  AffineJob job(pipeline, "dualpipe", 4);
  expect_all_ok(job.step());
  const auto outcomes = pipeline.on_all([&](Engine& engine) {
    if (engine.rank() == Rank(0)) job.step_on(engine);
  });
  EXPECT_TRUE(outcomes[0].is<PipelineError>());
  EXPECT_NE(outcomes[0].text().find("waits for the other ranks to begin it"), std::string::npos)
      << outcomes[0].text();
}

}  // namespace
}  // namespace dualpipe
