#include "engine/pipeline.h"

#include <gtest/gtest.h>

#include <thread>

#include "comm/device_ranks.h"
#include "comm/framed_transport.h"
#include "comm/store_control_plane.h"
#include "schedule/planners/planners.h"

namespace dualpipe::testing {

std::string to_string(Over over) {
  constexpr const char* kNames[] = {"Loopback", "Frames", "Nccl", "Copy"};
  return kNames[static_cast<std::size_t>(over)];
}

std::string Outcome::text() const {
  try {
    if (error_) std::rethrow_exception(error_);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

EnginePipeline::EnginePipeline(int num_ranks, const PipelineOptions& options)
    : hub_(LoopbackHub::create(num_ranks, options.link)) {
  for (int i = 0; i < num_ranks; ++i) {
    const Rank rank(i);
    auto [transport, control, device] = ends(rank, num_ranks, options);
    if (options.wrap) transport = options.wrap(rank, std::move(transport));
    engines_.push_back(std::make_unique<Engine>(rank, std::move(transport), std::move(control),
                                                options.watchdog, std::move(device)));
  }
}

EnginePipeline::Ends EnginePipeline::ends(Rank rank, int num_ranks,
                                          const PipelineOptions& options) {
  switch (options.over) {
    case Over::kLoopback:
      return {hub_->transport(rank), hub_->control_plane(rank)};
    case Over::kNccl:
    case Over::kCopy:
      return device_ends(rank, num_ranks, options);
    case Over::kFrames:
      break;
  }
  FramedOptions frames{rank, num_ranks, {}, 0};
  for (int peer = 0; peer < num_ranks; ++peer) {
    if (peer != rank.value()) frames.peers.emplace_back(peer);
  }
  return {framed_transport(fabric_.link(rank), std::move(frames)),
          store_control_plane(store_.open(), rank, num_ranks)};
}

EnginePipeline::Ends EnginePipeline::device_ends(Rank rank, int num_ranks,
                                                 const PipelineOptions& options) {
  const LinkKind kind = options.over == Over::kNccl ? LinkKind::kNccl : LinkKind::kCopy;
  const auto device = std::make_shared<FakeDevice>();
  auto transport = device_rank(world_, kind, fabric_, rank, num_ranks, device);
  auto control = store_control_plane(store_.open(), rank, num_ranks);
  if (!options.computes_on_host) return {std::move(transport), std::move(control), device};
  return {synchronized(std::move(transport)), std::move(control)};
}

std::vector<Outcome> EnginePipeline::on_all(const std::function<void(Engine&)>& body) {
  std::vector<Outcome> outcomes(engines_.size());
  std::vector<std::thread> threads;
  for (std::size_t rank = 0; rank < engines_.size(); ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(*engines_[rank]);
      } catch (...) {
        outcomes[rank] = Outcome(std::current_exception());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

AffineJob::AffineJob(EnginePipeline& pipeline, std::string_view planner, int num_microbatches,
                     const LoweringOptions& options)
    : pipeline_(pipeline),
      lowered_(lower(plan(planner, {pipeline.num_ranks(), num_microbatches}), options)) {
  for (int rank = 0; rank < pipeline.num_ranks(); ++rank) {
    programs_.push_back(make_program(lowered_, Rank(rank), cat(num_microbatches, " of a test")));
    stages_.emplace_back(lowered_.placement, pipeline.engine(rank).weight_queue());
  }
}

std::vector<Outcome> AffineJob::step() {
  return pipeline_.on_all([this](Engine& engine) { step_on(engine); });
}

void AffineJob::step_on(Engine& engine) {
  AffineStages& stages = stages_[engine.rank().index()];
  stages.clear();
  engine.run(programs_[engine.rank().index()], stages, nullptr);
}

Results AffineJob::results() const {
  Results sum = stages_[0].results();
  for (std::size_t rank = 1; rank < stages_.size(); ++rank) {
    const Results& share = stages_[rank].results();
    for (std::size_t i = 0; i < sum.outputs.size(); ++i) {
      sum.outputs[i] += share.outputs[i];
      sum.input_grads[i] += share.input_grads[i];
    }
    for (std::size_t s = 0; s < sum.parameters.size(); ++s) {
      sum.parameters[s].scale += share.parameters[s].scale;
      sum.parameters[s].shift += share.parameters[s].shift;
    }
  }
  return sum;
}

std::vector<Action> AffineJob::computations(int rank) const {
  std::vector<Action> actions;
  for (const Action& action : lowered_.row(Rank(rank))) {
    if (is_compute(action.op())) actions.push_back(action);
  }
  return actions;
}

void expect_in_order(const Trace& trace, const std::vector<Action>& computations) {
  ASSERT_EQ(trace.events.size(), computations.size());
  std::int64_t clock = 0;
  for (std::size_t i = 0; i < computations.size(); ++i) {
    const TraceEvent& event = trace.events[i];
    EXPECT_EQ(event.action, computations[i]);
    EXPECT_GE(event.start_ns, clock);
    EXPECT_GE(event.end_ns, event.start_ns);
    EXPECT_GE(event.wait_ns, 0);
    EXPECT_LE(event.wait_ns, event.end_ns - event.start_ns);
    clock = event.end_ns;
  }
  EXPECT_GE(trace.duration_ns, clock);
}

void expect_all_ok(const std::vector<Outcome>& outcomes) {
  for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
    EXPECT_TRUE(outcomes[rank].ok()) << "rank " << rank << ": " << outcomes[rank].text();
  }
}

}  // namespace dualpipe::testing
