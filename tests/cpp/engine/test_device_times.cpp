#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "device/fake_device.h"
#include "engine/pipeline.h"
#include "engine/trace.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

constexpr std::int64_t kMillisecond = 1'000'000;

// Ranks whose devices, which are threads, still work when the call that issues it has returned.
class DeviceTrace : public ::testing::Test {
 protected:
  explicit DeviceTrace(const char* planner = "dualpipe", int num_microbatches = 4)
      : job(pipeline, planner, num_microbatches) {
    for (int rank = 0; rank < 2; ++rank) {
      pipeline.engine(rank).clock_with(fake_stopwatches(device(rank)));
      job.stages(rank).before = [this, rank](const Action&) { issue(rank, 2ms); };
    }
  }

  // Issues work of this length, once the stage's input is there; it takes time on the device only.
  void issue(int rank, std::chrono::milliseconds length) {
    FakeStream& stream = device(rank).compute();
    stream.record()->synchronize();
    stream.launch([length] { std::this_thread::sleep_for(length); });
  }
  FakeDevice& device(int rank) { return dynamic_cast<FakeDevice&>(pipeline.engine(rank).device()); }
  void time_device(bool on) {
    for (int rank = 0; rank < 2; ++rank) pipeline.engine(rank).time_device(on);
  }

  static PipelineOptions options() {
    PipelineOptions options;
    options.over = Over::kNccl;
    options.computes_on_host = false;
    return options;
  }

  EnginePipeline pipeline{2, options()};
  AffineJob job;
};

TEST_F(DeviceTrace, HasTheTimesOfTheWorkAndNotOfItsIssue) {
  time_device(true);
  for (int step = 0; step < 2; ++step) expect_all_ok(job.step());
  for (int rank = 0; rank < 2; ++rank) {
    const Trace& trace = pipeline.engine(rank).trace();
    EXPECT_EQ(trace.clock, Clock::kDevice);
    expect_in_order(trace, job.computations(rank));
    for (const TraceEvent& event : trace.events) {
      EXPECT_GE(event.end_ns - event.start_ns - event.wait_ns, 2 * kMillisecond);
    }
    EXPECT_GE(trace.busy_ns(), static_cast<std::int64_t>(trace.events.size()) * 2 * kMillisecond);
  }
}

TEST_F(DeviceTrace, IsOfTheHostUnlessAskedFor) {
  expect_all_ok(job.step());
  EXPECT_EQ(pipeline.engine(0).trace().clock, Clock::kHost);
  time_device(true);
  expect_all_ok(job.step());
  EXPECT_EQ(pipeline.engine(0).trace().clock, Clock::kDevice);
  time_device(false);
  expect_all_ok(job.step());
  EXPECT_EQ(pipeline.engine(0).trace().clock, Clock::kHost);
}

TEST_F(DeviceTrace, OutlivesWhatIsRunAfterTheStep) {
  time_device(true);
  expect_all_ok(job.step());
  expect_all_ok(pipeline.on_all([](Engine& engine) { engine.synchronize(); }));
  const Trace& trace = pipeline.engine(1).trace();
  EXPECT_EQ(trace.clock, Clock::kDevice);
  EXPECT_EQ(trace.events.size(), job.computations(1).size());
}

TEST_F(DeviceTrace, OfAStepThatFailedIsOfTheHost) {
  time_device(true);
  const auto issue_work = job.stages(1).before;
  job.stages(1).before = [&](const Action& action) {
    if (action.op() == Op::kBackward) throw std::runtime_error("no");
    issue_work(action);
  };
  for (const Outcome& outcome : job.step()) EXPECT_FALSE(outcome.ok());
  EXPECT_EQ(pipeline.engine(1).trace().clock, Clock::kHost);
  EXPECT_EQ(pipeline.engine(1).trace().duration_ns, 0);
  job.stages(1).before = issue_work;
  expect_all_ok(job.step());
  EXPECT_EQ(pipeline.engine(1).trace().clock, Clock::kDevice);
}

TEST_F(DeviceTrace, OfAStepAtWorkIsOfTheHost) {
  time_device(true);
  const auto issue_work = job.stages(1).before;
  std::size_t num_seen = 0;
  job.stages(1).before = [&](const Action& action) {
    issue_work(action);
    const Trace& trace = pipeline.engine(1).trace();
    EXPECT_EQ(trace.clock, Clock::kHost);
    num_seen = std::max(num_seen, trace.events.size());
  };
  expect_all_ok(job.step());
  EXPECT_EQ(num_seen, job.computations(1).size() - 1);
  EXPECT_EQ(pipeline.engine(1).trace().clock, Clock::kDevice);
}

class DeviceTraceOfOneMicrobatch : public DeviceTrace {
 protected:
  DeviceTraceOfOneMicrobatch() : DeviceTrace("gpipe", 1) {}
};

TEST_F(DeviceTraceOfOneMicrobatch, TellsWaitingFromComputing) {
  job.stages(0).before = [this](const Action& action) {
    issue(0, action.op() == Op::kForward ? 30ms : 2ms);
  };
  time_device(true);
  expect_all_ok(job.step());
  const TraceEvent& slow = pipeline.engine(0).trace().events[0];
  EXPECT_EQ(slow.wait_ns, 0);
  EXPECT_GE(slow.end_ns - slow.start_ns, 30 * kMillisecond);
  const Trace& trace = pipeline.engine(1).trace();
  EXPECT_GE(trace.events[0].wait_ns, 10 * kMillisecond);
  EXPECT_LT(trace.busy_ns(), trace.duration_ns - 10 * kMillisecond);
}

}  // namespace
}  // namespace dualpipe
