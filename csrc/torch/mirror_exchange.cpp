#include "torch/mirror_exchange.h"

#include <c10/core/GradMode.h>

#include <algorithm>

#include "common/error.h"

namespace dualpipe {
namespace {

// Whole tensors, in order, until a bucket holds bucket_bytes.
std::vector<Tensors> make_buckets(const Tensors& tensors, std::size_t bucket_bytes) {
  std::vector<Tensors> buckets;
  std::size_t bytes = bucket_bytes;
  for (const at::Tensor& tensor : tensors) {
    if (bytes >= bucket_bytes) {
      buckets.emplace_back();
      bytes = 0;
    }
    buckets.back().push_back(tensor);
    bytes += tensor.nbytes();
  }
  return buckets;
}

Tensors gradients_of(const Tensors& parameters) {
  Tensors gradients;
  for (const at::Tensor& parameter : parameters) gradients.push_back(parameter.grad());
  return gradients;
}

void add_gradient(at::Tensor parameter, const at::Tensor& theirs) {
  if (!theirs.defined()) return;
  at::Tensor& mine = parameter.mutable_grad();
  if (mine.defined()) {
    mine.add_(theirs);
  } else {
    mine = theirs.clone();
  }
}

}  // namespace

MirrorExchange::MirrorExchange(Transport& transport, Rank rank, int num_ranks,
                               std::vector<StageTensors> stages, std::size_t bucket_bytes,
                               Mode mode, bool together)
    : transport_(transport),
      rank_(rank),
      mirror_(num_ranks - 1 - rank.value()),
      num_ranks_(num_ranks),
      mode_(mode),
      together_(together) {
  for (StageTensors& stage : stages) {
    stages_[stage.stage].buckets = make_buckets(stage.tensors, bucket_bytes);
  }
}

void MirrorExchange::start(Stage stage) {
  stages_.at(stage).started = true;
  const bool all_started = std::all_of(stages_.begin(), stages_.end(),
                                       [](const auto& entry) { return entry.second.started; });
  if (!together_) return launch(stage, stages_.at(stage));
  if (!all_started) return;
  for (auto& [id, state] : stages_) launch(id, state);
}

void MirrorExchange::launch(Stage stage, StageState& state) {
  if (state.stream == nullptr) state.stream = std::make_unique<HostStream>("dualpipe mirror");
  state.stream->enqueue([this, stage, &state] { exchange(stage, state); });
}

void MirrorExchange::finish() {
  for (auto& [stage, state] : stages_) {
    if (state.stream != nullptr) state.stream->synchronize();
    state.started = false;
  }
}

void MirrorExchange::cancel() noexcept {
  for (auto& [stage, state] : stages_) {
    state.stream.reset();
    state.started = false;
  }
}

void MirrorExchange::exchange(Stage stage, StageState& state) {
  const c10::NoGradGuard no_grad;
  std::vector<std::unique_ptr<PendingReceive>> pending;
  if (receives()) {
    for (std::size_t i = 0; i < state.buckets.size(); ++i) {
      pending.push_back(transport_.receive(mirror_, message(stage, i)));
    }
  }
  if (sends()) send(stage, state);
  for (std::size_t i = 0; i < pending.size(); ++i) {
    apply(stage, state.buckets[i], tensors_of(pending[i]->wait(), at::kCPU, false));
  }
}

void MirrorExchange::send(Stage stage, const StageState& state) {
  for (std::size_t i = 0; i < state.buckets.size(); ++i) {
    const Tensors& bucket = state.buckets[i];
    const bool gradients = mode_ == Mode::kSumGradients;
    transport_.send(mirror_, message(stage, i),
                    message_of(gradients ? gradients_of(bucket) : bucket, at::kCPU), nullptr);
  }
}

void MirrorExchange::apply(Stage stage, const Tensors& bucket, Tensors theirs) const {
  DUALPIPE_CHECK(bucket.size() == theirs.size(), "stage ", stage, ": a bucket of ", bucket.size(),
                 " tensors met one of ", theirs.size());
  for (std::size_t i = 0; i < bucket.size(); ++i) {
    if (mode_ == Mode::kSumGradients) {
      add_gradient(bucket[i], theirs[i].defined() ? theirs[i].to(bucket[i].device()) : theirs[i]);
    } else {
      at::Tensor(bucket[i]).copy_(theirs[i]);
    }
  }
}

MessageId MirrorExchange::message(Stage stage, std::size_t bucket) const {
  const bool low = 2 * stage.value() < num_ranks_;
  return {.kind = low ? MessageKind::kMirrorLow : MessageKind::kMirrorHigh,
          .stage = stage,
          .microbatch = Microbatch(static_cast<std::int32_t>(bucket))};
}

bool MirrorExchange::sends() const { return mode_ == Mode::kSumGradients || rank_ < mirror_; }

bool MirrorExchange::receives() const { return mode_ == Mode::kSumGradients || mirror_ < rank_; }

}  // namespace dualpipe
