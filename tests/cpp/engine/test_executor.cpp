#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/error.h"
#include "engine/pipeline.h"
#include "engine/recording_transport.h"
#include "schedule/planners/planners.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;

struct Case {
  std::string planner;
  int num_ranks;
  int num_microbatches;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << c.planner << "_P" << c.num_ranks << "_N" << c.num_microbatches;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const PlannerInfo& planner : planners()) {
    for (int num_ranks : {1, 2, 4, 8}) {
      if (planner.placement == PlacementKind::kBidirectional && num_ranks == 1) continue;
      for (int num_microbatches : {2 * num_ranks, 4 * num_ranks}) {
        all.push_back({std::string(planner.name), num_ranks, num_microbatches});
      }
    }
  }
  return all;
}

class EveryPlanner : public ::testing::TestWithParam<Case> {
 protected:
  // Two steps: the second shows that the first left nothing behind.
  void expect_unsplit_results(const LoweringOptions& options, Over over = Over::kLoopback) {
    PipelineOptions pipeline_options;
    pipeline_options.over = over;
    EnginePipeline pipeline(GetParam().num_ranks, pipeline_options);
    AffineJob job(pipeline, GetParam().planner, GetParam().num_microbatches, options);
    for (int step = 0; step < 2; ++step) {
      expect_all_ok(job.step());
      EXPECT_EQ(job.results(), unsplit(job.lowered().placement, options.with_backward));
    }
    for (int rank = 0; rank < pipeline.num_ranks(); ++rank) {
      EXPECT_EQ(pipeline.engine(rank).weight_queue()->num_pending(), 0u);
      EXPECT_EQ(pipeline.engine(rank).num_steps(), 2);
    }
  }
};

TEST_P(EveryPlanner, ComputesWhatTheUnsplitModelComputes) { expect_unsplit_results({}); }

TEST_P(EveryPlanner, AlsoWithReceivesPostedLateOrEarly) {
  for (int lookahead : {0, 1, 1000}) {
    LoweringOptions options;
    options.lookahead = lookahead;
    expect_unsplit_results(options);
  }
}

TEST_P(EveryPlanner, AlsoWithPairsInOnePiece) {
  LoweringOptions options;
  options.keep_overlap = true;
  expect_unsplit_results(options);
}

TEST_P(EveryPlanner, AlsoOverFrames) { expect_unsplit_results({}, Over::kFrames); }

TEST_P(EveryPlanner, AlsoOverNccl) { expect_unsplit_results({}, Over::kNccl); }

TEST_P(EveryPlanner, AlsoByCopyEngines) { expect_unsplit_results({}, Over::kCopy); }

TEST_P(EveryPlanner, AlsoWithoutBackward) {
  LoweringOptions options;
  options.with_backward = false;
  expect_unsplit_results(options);
}

INSTANTIATE_TEST_SUITE_P(All, EveryPlanner, ::testing::ValuesIn(cases()),
                         ::testing::PrintToStringParamName());

TEST(Executor, GivesPairsInOnePieceToTheRunner) {
  EnginePipeline pipeline(4);
  LoweringOptions options;
  options.keep_overlap = true;
  AffineJob job(pipeline, "dualpipe", 8, options);
  expect_all_ok(job.step());
  for (int rank = 0; rank < 4; ++rank) EXPECT_EQ(job.stages(rank).num_pairs(), 3) << rank;
}

// By the time the next computation starts, nothing that was sent is kept.
TEST(Executor, LetsGoOfResultsAsSoonAsTheyAreSent) {
  EnginePipeline pipeline(4);
  AffineJob job(pipeline, "dualpipe", 8);
  for (int rank = 0; rank < 4; ++rank) {
    AffineStages& stages = job.stages(rank);
    stages.before = [&stages](const Action& action) {
      for (const auto& message : stages.handed_over()) {
        EXPECT_EQ(message.use_count(), 0) << "kept until " << to_string(action);
      }
    };
  }
  expect_all_ok(job.step());
}

// Index of the only entry with this text.
std::ptrdiff_t at(const std::vector<std::string>& log, const std::string& text) {
  EXPECT_EQ(std::count(log.begin(), log.end(), text), 1) << text;
  return std::find(log.begin(), log.end(), text) - log.begin();
}

// What rank 1 of two does in a step of 1f1b: its transport's calls and its computations.
std::vector<std::string> log_of_last_rank(int lookahead) {
  std::vector<std::string> log;
  PipelineOptions options;
  options.wrap = [&log](Rank rank, std::unique_ptr<Transport> transport) {
    if (rank == Rank(0)) return transport;
    return std::unique_ptr<Transport>(std::make_unique<RecordingTransport>(
        std::move(transport), [&log](const std::string& call) { log.push_back(call); }));
  };
  EnginePipeline pipeline(2, options);
  LoweringOptions lowering;
  lowering.lookahead = lookahead;
  AffineJob job(pipeline, "1f1b", 6, lowering);
  job.stages(1).before = [&log](const Action& action) { log.push_back(to_string(action)); };
  expect_all_ok(job.step());
  return log;
}

TEST(Executor, PostsReceivesAheadAndWaitsWhereTheDataIsUsed) {
  const auto log = log_of_last_rank(2);
  for (int microbatch = 1; microbatch < 6; ++microbatch) {
    const std::string message = cat("activation of micro-batch ", microbatch, " for stage 1");
    const std::string use = cat("1F", microbatch);
    EXPECT_LT(at(log, "receive " + message), at(log, cat("1I", microbatch - 1)));
    EXPECT_EQ(at(log, "wait " + message) + 1, at(log, use));
  }
}

TEST(Executor, SendsInputGradientsBeforeWeights) {
  const auto log = log_of_last_rank(2);
  for (int microbatch = 0; microbatch < 6; ++microbatch) {
    const auto send = at(log, cat("send gradient of micro-batch ", microbatch, " for stage 0"));
    EXPECT_EQ(at(log, cat("1I", microbatch)) + 1, send);
    EXPECT_LT(send, at(log, cat("1W", microbatch)));
  }
}

TEST(Executor, CommitsOnceAtTheEnd) {
  const auto log = log_of_last_rank(2);
  EXPECT_EQ(at(log, "begin_step"), 0);
  EXPECT_EQ(at(log, "end_step"), static_cast<std::ptrdiff_t>(log.size()) - 2);
}

class CountingReducer final : public GradientReducer {
 public:
  void advance(Stage stage, const PendingWeights&) override { advanced.push_back(stage); }
  void start(Stage stage) override { started.push_back(stage); }
  void finish() override {
    if (throws) throw PipelineError("the sum went wrong");
    ++num_finished;
  }
  void cancel() noexcept override { ++num_cancelled; }

  std::vector<Stage> advanced;
  std::vector<Stage> started;
  int num_finished = 0;
  int num_cancelled = 0;
  bool throws = false;
};

TEST(Executor, ReducesEachStageOnceItsGradientsAreFinal) {
  EnginePipeline pipeline(4);
  LoweringOptions options;
  options.reduce_gradients = true;
  AffineJob job(pipeline, "dualpipe", 8, options);
  std::vector<CountingReducer> reducers(4);
  for (int rank = 0; rank < 4; ++rank) {
    job.stages(rank).before = [&, rank](const Action& action) {
      const auto& started = reducers[static_cast<std::size_t>(rank)].started;
      for_each_part(action, [&](const Action& part) {
        if (part.op() == Op::kForward) return;
        EXPECT_EQ(std::count(started.begin(), started.end(), part.stage()), 0) << rank;
      });
    };
  }
  expect_all_ok(pipeline.on_all([&](Engine& engine) {
    const int rank = engine.rank().value();
    engine.run(job.program(rank), job.stages(rank), &reducers[engine.rank().index()]);
  }));
  for (int rank = 0; rank < 4; ++rank) {
    CountingReducer& reducer = reducers[static_cast<std::size_t>(rank)];
    EXPECT_EQ(reducer.advanced, reducer.started);  // only by the last W of each stage
    std::sort(reducer.started.begin(), reducer.started.end());
    EXPECT_EQ(reducer.started,
              (std::vector{Stage(std::min(rank, 3 - rank)), Stage(std::max(rank, 3 - rank))}));
    EXPECT_EQ(reducer.num_finished, 1);
    EXPECT_EQ(reducer.num_cancelled, 0);
  }
}

TEST(Executor, ExchangesGradientsWithoutComputation) {
  EnginePipeline pipeline(2);
  std::vector<CountingReducer> reducers(2);
  expect_all_ok(pipeline.on_all([&](Engine& engine) {
    const Program program = make_reduce_program(engine.rank(), {Stage(0), Stage(1)}, "a test");
    engine.exchange(program, reducers[engine.rank().index()]);
  }));
  for (const CountingReducer& reducer : reducers) {
    EXPECT_EQ(reducer.started, (std::vector{Stage(0), Stage(1)}));
    EXPECT_EQ(reducer.num_finished, 1);
  }
}

TEST(Executor, CancelsTheReductionOfAFailedStep) {
  EnginePipeline pipeline(2);
  std::vector<CountingReducer> reducers(2);
  reducers[1].throws = true;
  const auto outcomes = pipeline.on_all([&](Engine& engine) {
    const Program program = make_reduce_program(engine.rank(), {Stage(0)}, "a test");
    engine.exchange(program, reducers[engine.rank().index()]);
  });
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_TRUE(outcomes[static_cast<std::size_t>(rank)].is<PipelineError>());
    EXPECT_NE(outcomes[static_cast<std::size_t>(rank)].text().find("the sum went wrong"),
              std::string::npos);
    EXPECT_EQ(reducers[static_cast<std::size_t>(rank)].num_cancelled, 1);
  }
}

}  // namespace
}  // namespace dualpipe
