#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "engine/pipeline.h"
#include "engine/trace.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

constexpr std::int64_t kMillisecond = 1'000'000;

TEST(Trace, HoldsEachComputationInOrder) {
  EnginePipeline pipeline(4);
  AffineJob job(pipeline, "dualpipe", 12);
  for (int step = 0; step < 2; ++step) expect_all_ok(job.step());
  for (int rank = 0; rank < 4; ++rank) {
    expect_in_order(pipeline.engine(rank).trace(), job.computations(rank));
  }
}

TEST(Trace, TellsWaitingFromComputing) {
  EnginePipeline pipeline(2);
  AffineJob job(pipeline, "gpipe", 1);
  job.stages(0).before = [](const Action& action) {
    if (action.op() == Op::kForward) std::this_thread::sleep_for(30ms);
  };
  expect_all_ok(job.step());
  const TraceEvent& slow = pipeline.engine(0).trace().events[0];
  EXPECT_EQ(slow.wait_ns, 0);
  EXPECT_GE(slow.end_ns - slow.start_ns, 30 * kMillisecond);
  const Trace& trace = pipeline.engine(1).trace();
  EXPECT_GE(trace.events[0].wait_ns, 10 * kMillisecond);
  EXPECT_LT(trace.busy_ns(), trace.duration_ns - 10 * kMillisecond);
}

TEST(Trace, CountsThePeakOfDualPipe) {
  for (int num_ranks : {2, 4, 8}) {
    EnginePipeline pipeline(num_ranks);
    AffineJob job(pipeline, "dualpipe", 3 * num_ranks);
    expect_all_ok(job.step());
    for (int rank = 0; rank < num_ranks; ++rank) {
      EXPECT_EQ(pipeline.engine(rank).trace().peak_live_activations, num_ranks + 1)
          << "rank " << rank << " of " << num_ranks;
    }
  }
}

TEST(Trace, AgreesWithThePlannedPeak) {
  for (const char* planner : {"1f1b", "zb1p", "gpipe", "zbv", "dualpipev", "interleaved_1f1b"}) {
    EnginePipeline pipeline(4);
    AffineJob job(pipeline, planner, 8);
    expect_all_ok(job.step());
    for (int rank = 0; rank < 4; ++rank) {
      EXPECT_EQ(pipeline.engine(rank).trace().peak_live_activations,
                job.program(rank).planned_peak_activations)
          << planner << ", rank " << rank;
    }
  }
}

}  // namespace
}  // namespace dualpipe
