#pragma once

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "comm/transport.h"
#include "device/host_stream.h"
#include "engine/stage_runner.h"
#include "torch/tensor_message.h"

namespace dualpipe {

// The parameters of one stage on this rank, in the order of Module.parameters(); for kCopy also the
// buffers.
struct StageTensors {
  Stage stage;
  Tensors tensors;
};

// Makes the two copies of each stage agree, over the pipeline's own transport:
//   kSumGradients  both add the other's gradient to their own: a + b = b + a, so that both hold
//                  the same bits. A gradient that only one copy has becomes the other's as well.
//   kCopy          the first copy, on the rank with the stage's own number, overwrites the other.
// Buckets of whole tensors, the last parameters of a stage first, as W finishes them, are sent as
// soon as they are final, some ahead of the sums. together: the stages share parameters, so none is
// final before all stages have been started.
//
// Each stage has a thread and, on a device, a reduction stream. Except with such shared parameters,
// a stage waits neither for the other one nor for the thread that runs the step, which may still be
// in a stage's own code during the cool-down or far ahead of its device. If a schedule treats both
// directions alike, both copies of a stage finish at the same point, so the one that is done early
// is summed while the other stage computes. The compute stream waits for the sums at the end of the
// step. Until then the exchange owns the gradients of a stage that was started: nobody may replace
// them. In two cases there are no threads, and the one that runs the step does everything at the
// end of it: if a reduction stream may not wait earlier (Device::reductions_may_wait), and if
// messages of a device go through host memory, in the order of the caller's stream.
class MirrorExchange final : public GradientReducer {
 public:
  enum class Mode { kSumGradients, kCopy };

  struct Options {
    Rank rank;
    int num_ranks;
    std::size_t bucket_bytes;
    Mode mode;
    bool together = false;
    at::Device message_device = at::kCPU;  // whose memory the transport carries
  };

  MirrorExchange(Transport& transport, Device& device, std::vector<StageTensors> stages,
                 Options options);

  void advance(Stage stage, const PendingWeights& pending) override;
  void start(Stage stage) override;
  void finish() override;
  void cancel() noexcept override;

 private:
  struct StageState {
    Stage stage;
    std::vector<Tensors> buckets;
    // Used by the thread that runs the step:
    bool started = false;
    std::size_t num_launched = 0;  // buckets, in order
    // Used by the stage's own thread, until it has finished:
    std::size_t num_begun = 0;
    std::vector<std::unique_ptr<PendingReceive>> incoming;  // of buckets that have begun
    std::vector<EventPtr> left;
    Tensors adopted;  // gradients made on the reduction stream

    std::unique_ptr<HostStream> thread;  // last: its tasks use the members above
  };

  void launch(StageState& state, std::size_t num_buckets);
  void enqueue(StageState& state, std::function<void()> task);
  void run(StageState& state, const std::function<void()>& task);
  void sum_now(StageState& state);
  void begin(StageState& state, std::size_t num_buckets);
  void complete(StageState& state);
  void apply(StageState& state, const Tensors& bucket, const Tensors& theirs);
  void add_gradient(StageState& state, const at::Tensor& parameter, const at::Tensor& theirs);
  void hold_back_computation();
  void forget(StageState& state);
  [[nodiscard]] Message outgoing(const Tensors& bucket) const;
  [[nodiscard]] MessageKind kind_of(Stage stage) const;
  [[nodiscard]] Stream& reduction_stream(const StageState& state) const;
  [[nodiscard]] bool sends(const StageState& state) const;
  [[nodiscard]] bool receives(const StageState& state) const;
  [[nodiscard]] bool is_first_copy(const StageState& state) const;

  Transport& transport_;
  Device& device_;
  const Options options_;
  const Rank mirror_;
  std::map<Stage, StageState> stages_;
  bool on_threads_;
};

// The ways that the exchanges of a rank use.
[[nodiscard]] std::vector<MessageWay> mirror_ways(Rank rank, int num_ranks);

}  // namespace dualpipe
