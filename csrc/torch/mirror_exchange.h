#pragma once

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
//   kCopy          the copy on the lower of the two ranks overwrites the other one.
// Buckets of whole tensors, the last parameters of a stage first, as W finishes them, are sent as
// soon as they are final. together: the stages share parameters, so none is final before all have
// been started.
//
// Over a transport of host memory each stage has a thread, so that one stage's wait never holds
// back the other's sends. On a device finish() adds what has come, on the reduction stream: by then
// the host has issued the step, which the device still computes. The compute stream waits for the
// sums, nobody else. One copy of a stage is done later than the other, in the same cool-down: its
// half travels when all computation is over, and no memory is spent on receiving the other before.
class MirrorExchange final : public GradientReducer {
 public:
  enum class Mode { kSumGradients, kCopy };

  struct Options {
    Rank rank;
    int num_ranks;
    std::size_t bucket_bytes;
    Mode mode;
    bool together = false;
    bool on_threads = true;                // false: on the device's reduction stream
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
    std::vector<Tensors> buckets;
    std::unique_ptr<HostStream> thread;
    bool started = false;
    std::size_t num_begun = 0;  // buckets, in order
    // Of buckets, between begin() and complete():
    std::vector<std::unique_ptr<PendingReceive>> incoming;
    std::vector<EventPtr> left;
  };

  void launch(Stage stage, StageState& state, std::size_t num_buckets);
  void complete_on_thread(Stage stage, StageState& state);
  void begin(Stage stage, StageState& state, std::size_t bucket);
  void complete(Stage stage, StageState& state);
  void apply(Stage stage, const Tensors& bucket, const Tensors& theirs);
  void add_gradient(const at::Tensor& parameter, const at::Tensor& theirs);
  void hand_over_adopted();
  [[nodiscard]] Message outgoing(const Tensors& bucket) const;
  [[nodiscard]] MessageId message(Stage stage, std::size_t bucket) const;
  [[nodiscard]] bool sends() const;
  [[nodiscard]] bool receives() const;

  Transport& transport_;
  Device& device_;
  const Options options_;
  const Rank mirror_;
  std::map<Stage, StageState> stages_;
  Tensors adopted_;  // gradients made on the reduction stream
};

// The ways that the exchanges of a rank take.
[[nodiscard]] std::vector<MessageWay> mirror_ways(Rank rank, int num_ranks);

}  // namespace dualpipe
