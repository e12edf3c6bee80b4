#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "comm/device_ranks.h"
#include "comm/loopback.h"
#include "comm/memory_link.h"
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
  // Whether the error is of exactly this type, not of one derived from it.
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

enum class Over : std::uint8_t { kLoopback, kFrames, kNccl, kCopy };
[[nodiscard]] std::string to_string(Over over);

struct PipelineOptions {
  Over over = Over::kLoopback;
  Watchdog::Options watchdog{std::chrono::milliseconds(5), std::chrono::seconds(60)};
  LinkOptions link;              // loopback
  bool computes_on_host = true;  // nccl, copy: messages are there when a wait returns
  std::function<std::unique_ptr<Transport>(Rank, std::unique_ptr<Transport>)> wrap;
};

// The engines of all ranks, which are threads: over loopback; over the transport and the control
// plane that processes use, on a link and a store in memory; or over those and a fake device link.
class EnginePipeline {
 public:
  explicit EnginePipeline(int num_ranks, const PipelineOptions& options = {});

  [[nodiscard]] int num_ranks() const { return static_cast<int>(engines_.size()); }
  [[nodiscard]] Engine& engine(int rank) { return *engines_[static_cast<std::size_t>(rank)]; }
  [[nodiscard]] LoopbackHub& hub() { return *hub_; }      // loopback
  [[nodiscard]] LinkFabric& fabric() { return fabric_; }  // all others
  [[nodiscard]] FakeWorld& world() { return world_; }     // nccl, copy

  // Runs the body on one thread per rank.
  std::vector<Outcome> on_all(const std::function<void(Engine&)>& body);

 private:
  struct Ends {
    std::unique_ptr<Transport> transport;
    std::unique_ptr<ControlPlane> control;
    std::shared_ptr<Device> device = host_device();
  };
  [[nodiscard]] Ends ends(Rank rank, int num_ranks, const PipelineOptions& options);
  [[nodiscard]] Ends device_ends(Rank rank, int num_ranks, const PipelineOptions& options);

  std::shared_ptr<LoopbackHub> hub_;
  LinkFabric fabric_;
  SharedStore store_;
  FakeWorld world_;
  std::vector<std::unique_ptr<Engine>> engines_;
};

// A schedule, lowered, with each rank's program and stages.
class AffineJob {
 public:
  AffineJob(EnginePipeline& pipeline, std::string_view planner, int num_microbatches,
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
  // The sum of all ranks' results.
  [[nodiscard]] Results results() const;
  // The actions of a rank that compute, in order.
  [[nodiscard]] std::vector<Action> computations(int rank) const;

 private:
  EnginePipeline& pipeline_;
  Schedule lowered_;
  std::vector<Program> programs_;
  std::vector<AffineStages> stages_;
};

// Fails the test unless the trace holds these computations, one after the other.
void expect_in_order(const Trace& trace, const std::vector<Action>& computations);

// Fails the test with the text of each rank that did not end well.
void expect_all_ok(const std::vector<Outcome>& outcomes);

}  // namespace dualpipe::testing
