#include "torch/mirror_exchange.h"

#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <utility>

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

bool is_final(const Tensors& bucket, const PendingWeights& pending) {
  return std::none_of(bucket.begin(), bucket.end(), [&pending](const at::Tensor& tensor) {
    const at::Tensor& grad = tensor.grad();
    return pending.contains(tensor.unsafeGetTensorImpl()) ||
           (grad.defined() && pending.contains(grad.const_data_ptr()));
  });
}

// Buckets on a device whose sends are ahead of their sums: a receive is issued by complete(), and a
// channel takes some hundreds of sends before it waits for the receives of the other side.
constexpr std::size_t kAhead = 128;

Rank mirror_of(Rank rank, int num_ranks) { return Rank(num_ranks - 1 - rank.value()); }

}  // namespace

MirrorExchange::MirrorExchange(Transport& transport, Device& device,
                               std::vector<StageTensors> stages, Options options)
    : transport_(transport),
      device_(device),
      options_(options),
      mirror_(mirror_of(options.rank, options.num_ranks)) {
  for (StageTensors& stage : stages) {
    std::reverse(stage.tensors.begin(), stage.tensors.end());
    stages_[stage.stage].buckets = make_buckets(stage.tensors, options_.bucket_bytes);
  }
}

void MirrorExchange::advance(Stage stage, const PendingWeights& pending) {
  if (options_.together) return;
  StageState& state = stages_.at(stage);
  std::size_t num_final = state.num_begun;
  while (num_final < state.buckets.size() && is_final(state.buckets[num_final], pending)) {
    ++num_final;
  }
  launch(stage, state, num_final);
}

void MirrorExchange::start(Stage stage) {
  stages_.at(stage).started = true;
  const bool all_started = std::all_of(stages_.begin(), stages_.end(),
                                       [](const auto& entry) { return entry.second.started; });
  if (options_.together && !all_started) return;
  for (auto& [id, state] : stages_) {
    if (!options_.together && id != stage) continue;
    launch(id, state, state.buckets.size());
    if (options_.on_threads) {
      complete_on_thread(id, state);
    } else if (state.num_begun < state.buckets.size()) {
      device_.reduction().wait(device_.compute().record());  // for those that complete() begins
    }
  }
}

// Begins what has not begun of the first buckets.
void MirrorExchange::launch(Stage stage, StageState& state, std::size_t num_buckets) {
  if (!options_.on_threads) num_buckets = std::min(num_buckets, kAhead);
  if (num_buckets <= state.num_begun) return;
  const std::size_t first = std::exchange(state.num_begun, num_buckets);
  const auto begin_all = [this, stage, &state, first, num_buckets] {
    const c10::NoGradGuard no_grad;
    for (std::size_t i = first; i < num_buckets; ++i) begin(stage, state, i);
  };
  if (options_.on_threads) {
    if (state.thread == nullptr) state.thread = std::make_unique<HostStream>("dualpipe mirror");
    state.thread->enqueue(begin_all);
  } else {
    device_.reduction().wait(device_.compute().record());
    device_.reduce(begin_all);
  }
}

void MirrorExchange::complete_on_thread(Stage stage, StageState& state) {
  if (state.thread == nullptr) return;  // no bucket
  state.thread->enqueue([this, stage, &state] { complete(stage, state); });
}

void MirrorExchange::finish() {
  for (auto& [stage, state] : stages_) {
    if (state.thread != nullptr) {
      state.thread->synchronize();
    } else if (state.started) {
      device_.reduce([&, id = stage] { complete(id, stages_.at(id)); });
    }
    state.started = false;
    state.num_begun = 0;
  }
  device_.compute().wait(device_.reduction().record());
  hand_over_adopted();
}

void MirrorExchange::cancel() noexcept {
  try {
    device_.compute().wait(device_.reduction().record());  // gradients are the caller's again
  } catch (const std::exception&) {
    // The device is broken.
  }
  for (auto& [stage, state] : stages_) {
    state.thread.reset();
    state.started = false;
    state.num_begun = 0;
    state.incoming.clear();
    state.left.clear();
  }
  adopted_.clear();
}

void MirrorExchange::begin(Stage stage, StageState& state, std::size_t bucket) {
  const MessageId id = message(stage, bucket);
  if (receives()) state.incoming.push_back(transport_.receive(mirror_, id));
  if (!sends()) return;
  Message own = outgoing(state.buckets[bucket]);
  state.left.push_back(transport_.send(mirror_, id, std::move(own), device_.reduction().record()));
}

void MirrorExchange::complete(Stage stage, StageState& state) {
  const c10::NoGradGuard no_grad;
  Message before;  // lent until the next one has been asked for, which then takes other memory
  for (std::size_t i = 0; i < state.buckets.size(); ++i) {
    if (state.num_begun < state.buckets.size()) begin(stage, state, state.num_begun++);
    // Its memory is free when the reduction stream is through with what it was given before. Were
    // that the wait for the own send, both mirrors would wait for each other.
    Arrival arrival = receives() ? state.incoming[i]->wait() : Arrival{};
    if (sends()) device_.reduction().wait(state.left[i]);
    if (!receives()) continue;
    device_.reduction().wait(arrival.ready);
    apply(stage, state.buckets[i], tensors_of(arrival.message, options_.message_device, false));
    before = std::move(arrival.message);
  }
  state.incoming.clear();
  state.left.clear();
}

Message MirrorExchange::outgoing(const Tensors& bucket) const {
  const bool gradients = options_.mode == Mode::kSumGradients;
  return message_of(gradients ? gradients_of(bucket) : bucket, options_.message_device);
}

void MirrorExchange::apply(Stage stage, const Tensors& bucket, const Tensors& theirs) {
  DUALPIPE_CHECK(bucket.size() == theirs.size(), "stage ", stage, ": a bucket of ", bucket.size(),
                 " tensors met one of ", theirs.size());
  for (std::size_t i = 0; i < bucket.size(); ++i) {
    if (options_.mode == Mode::kSumGradients) {
      add_gradient(bucket[i], theirs[i]);
    } else {
      at::Tensor(bucket[i]).copy_(theirs[i]);
    }
  }
}

void MirrorExchange::add_gradient(const at::Tensor& parameter, const at::Tensor& theirs) {
  if (!theirs.defined()) return;
  at::Tensor& mine = parameter.mutable_grad();
  if (mine.defined()) {
    mine.add_(theirs.to(mine.device()));
    return;
  }
  mine = theirs.clone().to(parameter.device());
  if (!options_.on_threads && !mine.is_cpu()) adopted_.push_back(mine);
}

// Their memory is the reduction stream's, and the compute stream uses it from now on.
void MirrorExchange::hand_over_adopted() {
  for (const at::Tensor& tensor : adopted_) {
    const c10::impl::VirtualGuardImpl streams(tensor.device().type());
    tensor.record_stream(streams.getStream(tensor.device()));
  }
  adopted_.clear();
}

MessageId MirrorExchange::message(Stage stage, std::size_t bucket) const {
  const bool low = 2 * stage.value() < options_.num_ranks;
  return {.kind = low ? MessageKind::kMirrorLow : MessageKind::kMirrorHigh,
          .stage = stage,
          .microbatch = Microbatch(static_cast<std::int32_t>(bucket))};
}

bool MirrorExchange::sends() const {
  return options_.mode == Mode::kSumGradients || options_.rank < mirror_;
}

bool MirrorExchange::receives() const {
  return options_.mode == Mode::kSumGradients || mirror_ < options_.rank;
}

std::vector<MessageWay> mirror_ways(Rank rank, int num_ranks) {
  std::vector<MessageWay> ways;
  for (const MessageKind kind : {MessageKind::kMirrorLow, MessageKind::kMirrorHigh}) {
    for (const bool outgoing : {true, false}) {
      ways.push_back({mirror_of(rank, num_ranks), kind, outgoing});
    }
  }
  return ways;
}

}  // namespace dualpipe
