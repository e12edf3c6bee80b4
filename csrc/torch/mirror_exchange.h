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
// Buckets of whole tensors travel as soon as their stage is started, each stage on a stream of its
// own, so that one stage's wait never holds back the other's sends. together: the stages share
// parameters, so none is final before all have been started.
class MirrorExchange final : public GradientReducer {
 public:
  enum class Mode { kSumGradients, kCopy };

  MirrorExchange(Transport& transport, Rank rank, int num_ranks, std::vector<StageTensors> stages,
                 std::size_t bucket_bytes, Mode mode, bool together);

  void start(Stage stage) override;
  void finish() override;
  void cancel() noexcept override;

 private:
  struct StageState {
    std::vector<Tensors> buckets;
    std::unique_ptr<HostStream> stream;
    bool started = false;
  };

  void launch(Stage stage, StageState& state);
  void exchange(Stage stage, StageState& state);
  void send(Stage stage, const StageState& state);
  void apply(Stage stage, const Tensors& bucket, Tensors theirs) const;
  [[nodiscard]] MessageId message(Stage stage, std::size_t bucket) const;
  [[nodiscard]] bool sends() const;
  [[nodiscard]] bool receives() const;

  Transport& transport_;
  Rank rank_;
  Rank mirror_;
  int num_ranks_;
  Mode mode_;
  bool together_;
  std::map<Stage, StageState> stages_;
};

}  // namespace dualpipe
