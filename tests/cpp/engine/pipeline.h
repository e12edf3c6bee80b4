#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "comm/loopback.h"
#include "engine/affine_stages.h"
#include "engine/engine.h"
#include "schedule/passes/passes.h"

namespace dualpipe::testing {

// How a step ended on one rank.
class Outcome {
 public:
  Outcome() = default;
  explicit Outcome(std::exception_ptr error) : error_(std::move(error)) {}

  [[nodiscard]] bool ok() const { return error_ == nullptr; }
  [[nodiscard]] std::string text() const;  // "" where it went well
  // Whether it is of this very type, not of one derived from it.
  template <typename Error>
  [[nodiscard]] bool is() const {
    try {
      if (error_) std::rethrow_exception(error_);
    } catch (const Error& error) {
      return typeid(error) == typeid(Error);
    } catch (...) {
    }
    return false;
  }

 private:
  std::exception_ptr error_;
};

struct PipelineOptions {
  Watchdog::Options watchdog{std::chrono::milliseconds(5), std::chrono::seconds(60)};
  LinkOptions link;
  std::function<std::unique_ptr<Transport>(Rank, std::unique_ptr<Transport>)> wrap;
};

// The engines of all ranks, over loopback.
class LoopbackPipeline {
 public:
  explicit LoopbackPipeline(int num_ranks, const PipelineOptions& options = {});

  [[nodiscard]] int num_ranks() const { return static_cast<int>(engines_.size()); }
  [[nodiscard]] Engine& engine(int rank) { return *engines_[static_cast<std::size_t>(rank)]; }
  [[nodiscard]] LoopbackHub& hub() { return *hub_; }

  // Runs the body on one thread a rank.
  std::vector<Outcome> on_all(const std::function<void(Engine&)>& body);

 private:
  std::shared_ptr<LoopbackHub> hub_;
  std::vector<std::unique_ptr<Engine>> engines_;
};

// A schedule, lowered, with each rank's program and stages.
class AffineJob {
 public:
  AffineJob(LoopbackPipeline& pipeline, std::string_view planner, int num_microbatches,
            const LoweringOptions& options = {});

  // One step on all ranks, from zero gradients.
  std::vector<Outcome> step();
  // The part of step() that one rank does.
  void step_on(Engine& engine);

  [[nodiscard]] const Schedule& lowered() const { return lowered_; }
  [[nodiscard]] const Program& program(int rank) const {
    return programs_[static_cast<std::size_t>(rank)];
  }
  [[nodiscard]] AffineStages& stages(int rank) { return stages_[static_cast<std::size_t>(rank)]; }
  // Of all ranks together.
  [[nodiscard]] Results results() const;
  // The actions of a rank that compute, in order.
  [[nodiscard]] std::vector<Action> computations(int rank) const;

 private:
  LoopbackPipeline& pipeline_;
  Schedule lowered_;
  std::vector<Program> programs_;
  std::vector<AffineStages> stages_;
};

// Fails the test with the text of each rank that did not end well.
void expect_all_ok(const std::vector<Outcome>& outcomes);

}  // namespace dualpipe::testing
