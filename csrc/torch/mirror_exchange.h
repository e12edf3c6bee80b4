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

// The parameters of one stage on this rank, in the order of Module.parameters(); for kCopy the
// buffers as well.
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
// final before all have been started.
//
// Each stage has a thread, and on a device a reduction stream: but for such shared parameters
// nothing waits for the other stage, nor for the thread that steps, which may be at the rest of the
// cool-down in a stage's own code or far ahead of its device. In a schedule that treats both
// directions alike both copies of a stage are done at the same point, so that what is done early is
// summed behind the computation of the other. The compute stream waits for the sums at the end of
// the step. Until then the gradients of a stage that was started are the exchange's: nobody may
// replace them. Without threads the one that steps does all at the end of the step: where a
// reduction stream may not wait before (Device::reductions_may_wait), and where messages of a
// device go by way of the host, in the order of the caller's stream.
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
    // Of the thread that steps:
    bool started = false;
    std::size_t num_launched = 0;  // buckets, in order
    // Of the stage's own thread, until it is through:
    std::size_t num_begun = 0;
    std::vector<std::unique_ptr<PendingReceive>> incoming;  // of buckets that have begun
    std::vector<EventPtr> left;
    Tensors adopted;  // gradients made on the reduction stream

    std::unique_ptr<HostStream> thread;  // last: what it runs uses what is above
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

// The ways that the exchanges of a rank take.
[[nodiscard]] std::vector<MessageWay> mirror_ways(Rank rank, int num_ranks);

}  // namespace dualpipe
