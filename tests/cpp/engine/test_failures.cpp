#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <random>
#include <string>
#include <thread>

#include "common/error.h"
#include "engine/pipeline.h"
#include "engine/recording_transport.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "\"" << part << "\" is missing in: " << text;
}

// The rank at fault gets what was thrown; the others learn who, where and what.
void expect_blamed(const std::vector<Outcome>& outcomes, int culprit, const Action& where) {
  for (int rank = 0; rank < static_cast<int>(outcomes.size()); ++rank) {
    const Outcome& outcome = outcomes[static_cast<std::size_t>(rank)];
    if (rank == culprit) {
      EXPECT_TRUE(outcome.is<std::runtime_error>());
      EXPECT_EQ(outcome.text(), "out of luck");
      continue;
    }
    EXPECT_TRUE(outcome.is<PipelineError>());
    expect_contains(outcome.text(), cat("rank ", culprit, ", step "));
    expect_contains(outcome.text(), cat(": ", to_string(where)));
    expect_contains(outcome.text(), "out of luck");
    expect_contains(outcome.text(), cat("(noticed by rank ", rank));
  }
}

// A job of four ranks whose stages throw on demand.
class FailingStage : public ::testing::TestWithParam<Over> {
 protected:
  template <typename Error>
  void throw_at(int rank, const Action& where, const std::string& text) {
    job.stages(rank).before = [where, text](const Action& action) {
      if (action == where) throw Error(text);
    };
  }
  void mend() {
    for (int rank = 0; rank < 4; ++rank) job.stages(rank).before = [](const Action&) {};
  }
  void expect_next_step_works() {
    mend();
    expect_all_ok(job.step());
    EXPECT_EQ(job.results(), unsplit(job.lowered().placement));
  }
  static PipelineOptions options() {
    PipelineOptions options;
    options.over = GetParam();
    return options;
  }

  EnginePipeline pipeline{4, options()};
  AffineJob job{pipeline, "dualpipe", 8};
};

INSTANTIATE_TEST_SUITE_P(Over, FailingStage,
                         ::testing::Values(Over::kLoopback, Over::kFrames, Over::kNccl,
                                           Over::kCopy),
                         [](const auto& info) { return to_string(info.param); });

TEST_P(FailingStage, MakesEveryRankThrowWithinASecond) {
  for (int culprit = 0; culprit < 4; ++culprit) {
    const auto computations = job.computations(culprit);
    for (std::size_t i = 0; i < computations.size(); i += 5) {
      const Action& where = computations[i];
      throw_at<std::runtime_error>(culprit, where, "out of luck");
      const auto start = Clock::now();
      const auto outcomes = job.step();
      EXPECT_LT(Clock::now() - start, 1s);
      expect_blamed(outcomes, culprit, where);
      expect_next_step_works();
    }
  }
}

TEST_P(FailingStage, KeepsTheTypeOfAUserError) {
  throw_at<UserError>(1, job.computations(1)[3], "the loss must be a scalar");
  const auto outcomes = job.step();
  EXPECT_TRUE(outcomes[1].is<UserError>());
  EXPECT_EQ(outcomes[1].text(), "the loss must be a scalar");
  for (std::size_t rank : {0, 2, 3}) EXPECT_TRUE(outcomes[rank].is<PipelineError>()) << rank;
  expect_next_step_works();
}

TEST_P(FailingStage, SaysWhereTheRankAtFaultStood) {
  throw_at<std::runtime_error>(2, job.computations(2)[4], "out of luck");
  (void)job.step();
  const Engine& engine = pipeline.engine(2);
  const auto at = static_cast<std::size_t>(engine.cursor());
  EXPECT_EQ(job.program(2).instructions[at].action, job.computations(2)[4]);
  expect_contains(engine.failure(), cat("action ", at + 1, " of "));
  expect_contains(engine.failure(), "out of luck");
}

TEST_P(FailingStage, ForgetsDeferredWeights) {
  throw_at<std::runtime_error>(0, job.computations(0).back(), "out of luck");
  (void)job.step();
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(pipeline.engine(rank).weight_queue()->num_pending(), 0u) << rank;
  }
  expect_next_step_works();
}

// The first recovery of rank 1 fails.
class FailingRecovery : public ::testing::Test {
 protected:
  void fail_a_step() {
    job.stages(2).before = [](const Action&) { throw std::runtime_error("out of luck"); };
    (void)job.step();
    job.stages(2).before = [](const Action&) {};
  }
  PipelineOptions options() {
    PipelineOptions options;
    options.over = Over::kFrames;
    options.wrap = [this](Rank rank, std::unique_ptr<Transport> inner) {
      return std::make_unique<RecordingTransport>(
          std::move(inner), [this, rank](const std::string& what) {
            if (rank == Rank(1) && what == "recover returns" && breaks.exchange(false)) {
              throw std::runtime_error("the device is broken");
            }
          });
    };
    return options;
  }

  std::atomic<bool> breaks{true};
  EnginePipeline pipeline{4, options()};
  AffineJob job{pipeline, "dualpipe", 8};
};

TEST_F(FailingRecovery, IsForgottenOnceAnotherOneWorked) {
  fail_a_step();
  for (const Outcome& outcome : pipeline.on_all([](Engine& engine) { engine.fail("a mistake"); })) {
    EXPECT_TRUE(outcome.ok());
  }
  expect_all_ok(job.step());
  EXPECT_EQ(job.results(), unsplit(job.lowered().placement));
}

// The others must not wait until their time limit for a rank whose device is broken.
TEST_F(FailingRecovery, IsToldToAllInTheNextStep) {
  fail_a_step();
  const auto start = Clock::now();
  for (const Outcome& outcome : job.step()) {
    EXPECT_TRUE(outcome.is<PipelineError>());
    expect_contains(outcome.text(), "rank 1, step 2");
    expect_contains(outcome.text(), "cannot go on after a failure: the device is broken");
  }
  EXPECT_LT(Clock::now() - start, 5s);
  expect_all_ok(job.step());
  EXPECT_EQ(job.results(), unsplit(job.lowered().placement));
}

TEST_P(FailingStage, SurvivesSeveralRanksFailingAtOnce) {
  for (int round = 0; round < 10; ++round) {
    for (int rank : {0, 3}) {
      throw_at<std::runtime_error>(rank, job.computations(rank)[0], cat("rank ", rank, " first"));
    }
    for (const Outcome& outcome : job.step()) EXPECT_FALSE(outcome.ok());
    expect_next_step_works();
  }
}

TEST_P(FailingStage, SurvivesManyFailuresAnywhere) {
  std::mt19937 random(7);
  for (int round = 0; round < 40; ++round) {
    mend();
    const int culprit = static_cast<int>(random() % 4);
    const auto computations = job.computations(culprit);
    throw_at<UserError>(culprit, computations[random() % computations.size()], "again");
    const auto outcomes = job.step();
    for (const Outcome& outcome : outcomes) EXPECT_FALSE(outcome.ok());
    EXPECT_TRUE(outcomes[static_cast<std::size_t>(culprit)].is<UserError>());
    if (round % 4 == 0) expect_next_step_works();
  }
  expect_next_step_works();
}

TEST_P(FailingStage, CanFailBeforeTheStep) {
  const auto start = Clock::now();
  const auto outcomes = pipeline.on_all([&](Engine& engine) {
    if (engine.rank() == Rank(2)) return engine.fail("labels are missing");
    job.step_on(engine);
  });
  EXPECT_LT(Clock::now() - start, 1s);
  EXPECT_TRUE(outcomes[2].ok());
  for (std::size_t rank : {0, 1, 3}) {
    EXPECT_TRUE(outcomes[rank].is<PipelineError>()) << rank;
    expect_contains(outcomes[rank].text(), "rank 2, step 1: labels are missing");
  }
  expect_next_step_works();
}

TEST_P(FailingStage, CanFailBeforeTheStepOnEveryRank) {
  for (int step = 0; step < 5; ++step) {
    expect_all_ok(pipeline.on_all([](Engine& engine) { engine.fail("no data"); }));
  }
  expect_next_step_works();
}

TEST_P(FailingStage, RefusesRanksThatRunDifferentSteps) {
  AffineJob other(pipeline, "dualpipe", 10);
  const auto start = Clock::now();
  const auto outcomes = pipeline.on_all(
      [&](Engine& engine) { (engine.rank() == Rank(3) ? other : job).step_on(engine); });
  EXPECT_LT(Clock::now() - start, 1s);
  bool noticed = false;
  for (const Outcome& outcome : outcomes) {
    // A rank may learn of it from another one before it notices by itself.
    EXPECT_TRUE(outcome.is<UserError>() || outcome.is<PipelineError>()) << outcome.text();
    expect_contains(outcome.text(), "8 of a test");
    expect_contains(outcome.text(), "10 of a test");
    noticed |= outcome.is<UserError>();
  }
  EXPECT_TRUE(noticed);
  expect_next_step_works();
}

TEST_P(FailingStage, MakesUpForAFailureThatOneRankSawAlone) {
  pipeline.engine(0).fail("a step that the others never saw");
  const auto outcomes = pipeline.on_all([&](Engine& engine) {
    if (engine.rank() != Rank(0)) job.step_on(engine);
  });
  for (std::size_t rank : {1, 2, 3}) EXPECT_TRUE(outcomes[rank].is<PipelineError>()) << rank;
  expect_next_step_works();
}

class InjectedFault : public FailingStage {};

INSTANTIATE_TEST_SUITE_P(Over, InjectedFault, ::testing::Values(Over::kLoopback));

TEST_P(InjectedFault, NamesTheLink) {
  pipeline.hub().inject([](Rank from, Rank to, const MessageId& id) {
    const bool hit = from == Rank(1) && to == Rank(2) && id.microbatch == Microbatch(2);
    return hit ? Fault::kFail : Fault::kNone;
  });
  const auto outcomes = job.step();
  for (const Outcome& outcome : outcomes) {
    EXPECT_TRUE(outcome.is<PipelineError>());
    expect_contains(outcome.text(), "rank 1 -> rank 2");
    expect_contains(outcome.text(), "activation of micro-batch 2 for stage 2");
    expect_contains(outcome.text(), "rank 1, step 1, action ");
  }
  pipeline.hub().inject(nullptr);
  expect_next_step_works();
}

TEST(LostMessage, EndsInATimeoutThatNamesChannelMicrobatchAndPositions) {
  PipelineOptions options;
  options.watchdog = {10ms, 300ms};
  EnginePipeline pipeline(4, options);
  AffineJob job(pipeline, "1f1b", 6);
  pipeline.hub().inject([](Rank from, Rank to, const MessageId& id) {
    const bool hit = from == Rank(2) && to == Rank(1) && id.kind == MessageKind::kGradient;
    return hit ? Fault::kDrop : Fault::kNone;
  });
  const auto outcomes = job.step();
  for (std::size_t rank = 0; rank < 4; ++rank) {
    const std::string text = outcomes[rank].text();
    EXPECT_TRUE(outcomes[rank].is<PipelineError>()) << text;
    expect_contains(text, "has waited longer than 0.3 s");
    expect_contains(text, "positions of all ranks:");
    expect_contains(text, "1I0, waits for the gradient of micro-batch 0 for stage 1 from rank 2");
    for (int other = 0; other < 4; ++other) expect_contains(text, cat("\n  rank ", other, ": "));
  }
  pipeline.hub().inject(nullptr);
  expect_all_ok(job.step());
  EXPECT_EQ(job.results(), unsplit(job.lowered().placement));
}

TEST(LostMessage, IsNamedWhenALaterOneArrives) {
  EnginePipeline pipeline(2);
  AffineJob job(pipeline, "gpipe", 4);
  pipeline.hub().inject([](Rank, Rank to, const MessageId& id) {
    const bool hit = to == Rank(1) && id.microbatch == Microbatch(1);
    return hit ? Fault::kDrop : Fault::kNone;
  });
  for (const Outcome& outcome : job.step()) {
    expect_contains(outcome.text(), "rank 0 -> rank 1");
    expect_contains(outcome.text(), "expected the activation of micro-batch 1");
  }
}

TEST(DeadRank, IsNamedByAllOthers) {
  PipelineOptions options;
  options.over = Over::kFrames;
  EnginePipeline pipeline(4, options);
  AffineJob job(pipeline, "dualpipe", 8);
  expect_all_ok(job.step());
  const auto start = Clock::now();
  const auto outcomes = pipeline.on_all([&](Engine& engine) {
    if (engine.rank() != Rank(2)) return job.step_on(engine);
    std::this_thread::sleep_for(20ms);
    pipeline.fabric().kill(Rank(2));
  });
  EXPECT_LT(Clock::now() - start, 5s);
  for (std::size_t rank : {0, 1, 3}) {
    EXPECT_TRUE(outcomes[rank].is<PipelineError>()) << outcomes[rank].text();
    expect_contains(outcomes[rank].text(), "rank 2");
  }
}

// The watchdog is too slow to end what still waits on rank 1 when its own link breaks.
TEST(LinkFault, EndsTheStepOfAllThreadsWhenAnotherRankWasAtFault) {
  std::atomic<int> num_aborts{0};
  PipelineOptions options;
  options.watchdog.poll_interval = 10s;
  options.wrap = [&](Rank rank, std::unique_ptr<Transport> transport) {
    if (rank == Rank(0)) return transport;
    auto log = [&](const std::string& call) { num_aborts += call == "abort" ? 1 : 0; };
    return std::unique_ptr<Transport>(
        std::make_unique<RecordingTransport>(std::move(transport), log));
  };
  EnginePipeline pipeline(2, options);
  AffineJob job(pipeline, "1f1b", 4);
  job.stages(0).before = [](const Action& action) {
    if (action.microbatch() == Microbatch(1)) throw UserError("the first cause");
  };
  job.stages(1).before = [](const Action&) {
    std::this_thread::sleep_for(50ms);
    throw PipelineError("broken link");
  };
  const auto outcomes = job.step();
  EXPECT_TRUE(outcomes[0].is<UserError>());
  EXPECT_TRUE(outcomes[1].is<PipelineError>());
  expect_contains(outcomes[1].text(), "the first cause");
  EXPECT_EQ(num_aborts, 1);
}

// Rank 1 is still inside the commit of step 1 when rank 0 fails in step 2.
TEST(LateFailure, DoesNotDisturbARankThatCommitsAnEarlierStep) {
  std::atomic<bool> committing{false};
  std::atomic<bool> disturbed{false};
  PipelineOptions options;
  options.wrap = [&](Rank rank, std::unique_ptr<Transport> transport) {
    if (rank == Rank(0)) return transport;
    auto log = [&](const std::string& call) {
      if (call == "end_step") committing = true;
      if (call == "abort" && committing) disturbed = true;
      if (call != "end_step returns") return;
      std::this_thread::sleep_for(100ms);  // 20 polls of the watchdog
      committing = false;
    };
    return std::unique_ptr<Transport>(
        std::make_unique<RecordingTransport>(std::move(transport), log));
  };
  EnginePipeline pipeline(2, options);
  AffineJob job(pipeline, "1f1b", 4);
  const auto outcomes = pipeline.on_all([&](Engine& engine) {
    job.step_on(engine);
    if (engine.rank() == Rank(0)) return engine.fail("changed its mind");
    EXPECT_FALSE(disturbed);
    EXPECT_THROW(job.step_on(engine), PipelineError);
  });
  expect_all_ok(outcomes);
  EXPECT_FALSE(disturbed);
  expect_all_ok(job.step());
}

// Inference: rank 0 waits for nobody, so it may be a whole failure ahead of the others.
TEST(LateFailure, IsSurvivedByARankThatNoticesItInItsCommit) {
  PipelineOptions options;
  options.watchdog.poll_interval = 300ms;
  EnginePipeline pipeline(2, options);
  LoweringOptions inference;
  inference.with_backward = false;
  AffineJob job(pipeline, "gpipe", 2, inference);
  job.stages(1).before = [](const Action& action) {
    if (action.microbatch() == Microbatch(1)) std::this_thread::sleep_for(100ms);
  };
  Program too_long = job.program(0);  // fails after everything has been sent
  too_long.instructions.push_back(too_long.instructions[0]);
  const auto outcomes = pipeline.on_all([&](Engine& engine) {
    if (engine.rank() == Rank(1)) {
      EXPECT_THROW(job.step_on(engine), PipelineError);
      return job.step_on(engine);
    }
    int num_calls = 0;
    job.stages(0).before = [&num_calls](const Action&) {
      if (++num_calls <= 2) return;
      std::this_thread::sleep_for(30ms);
      throw UserError("one too many");
    };
    EXPECT_THROW(engine.run(too_long, job.stages(0), nullptr), UserError);
    job.stages(0).before = [](const Action&) {};
    job.step_on(engine);
  });
  expect_all_ok(outcomes);
  EXPECT_EQ(job.results(), unsplit(job.lowered().placement, false));
}

}  // namespace
}  // namespace dualpipe
