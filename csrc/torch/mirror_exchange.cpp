#include "torch/mirror_exchange.h"

#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <utility>

#include "common/error.h"

namespace dualpipe {
namespace {

// Fills buckets with whole tensors, in order, until each holds bucket_bytes.
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

// How many buckets may be under way before the sums wait for those of the mirror: well below what a
// channel between devices takes before a sender waits for room (128 messages), and on the host each
// message is a copy.
constexpr std::size_t kAhead = 64;

Rank mirror_of(Rank rank, int num_ranks) { return Rank(num_ranks - 1 - rank.value()); }

}  // namespace

MirrorExchange::MirrorExchange(Transport& transport, Device& device,
                               std::vector<StageTensors> stages, Options options)
    : transport_(transport),
      device_(device),
      options_(options),
      mirror_(mirror_of(options.rank, options.num_ranks)),
      on_threads_(device.reductions_may_wait()) {
  for (StageTensors& stage : stages) {
    for (const at::Tensor& tensor : stage.tensors) {
      on_threads_ &= tensor.device().type() == options_.message_device.type();
    }
    std::reverse(stage.tensors.begin(), stage.tensors.end());
    StageState& state = stages_[stage.stage];
    state.stage = stage.stage;
    state.buckets = make_buckets(stage.tensors, options_.bucket_bytes);
  }
}

void MirrorExchange::advance(Stage stage, const PendingWeights& pending) {
  if (options_.together) return;
  StageState& state = stages_.at(stage);
  std::size_t num_final = state.num_launched;
  while (num_final < state.buckets.size() && is_final(state.buckets[num_final], pending)) {
    ++num_final;
  }
  launch(state, num_final);
}

void MirrorExchange::start(Stage stage) {
  stages_.at(stage).started = true;
  const bool all_started = std::all_of(stages_.begin(), stages_.end(),
                                       [](const auto& entry) { return entry.second.started; });
  if (options_.together && !all_started) return;
  for (auto& [id, state] : stages_) {
    if (!options_.together && id != stage) continue;
    if (state.buckets.empty()) continue;
    launch(state, state.buckets.size());
    if (on_threads_) enqueue(state, [this, &state] { complete(state); });
  }
}

// Lets the first num_buckets buckets begin; they are final at the compute stream's current point.
void MirrorExchange::launch(StageState& state, std::size_t num_buckets) {
  if (num_buckets <= state.num_launched) return;
  state.num_launched = num_buckets;
  if (!on_threads_) return;
  enqueue(state, [this, &state, num_buckets, final = device_.compute().record()] {
    reduction_stream(state).wait(final);
    begin(state, std::min(num_buckets, kAhead));
  });
}

void MirrorExchange::enqueue(StageState& state, std::function<void()> task) {
  if (state.thread == nullptr) state.thread = std::make_unique<HostStream>("dualpipe mirror");
  state.thread->throw_if_failed();
  state.thread->enqueue([this, &state, task = std::move(task)] { run(state, task); });
}

void MirrorExchange::run(StageState& state, const std::function<void()>& task) {
  const c10::NoGradGuard no_grad;
  device_.reduce(reduction_of(kind_of(state.stage)), task);
}

void MirrorExchange::finish() {
  for (auto& [stage, state] : stages_) {
    if (state.thread != nullptr) state.thread->throw_if_failed();
  }
  for (auto& [stage, state] : stages_) {
    if (state.thread != nullptr) state.thread->synchronize();
    if (!on_threads_ && state.num_launched > 0) sum_now(state);
  }
  hold_back_computation();
  for (auto& [stage, state] : stages_) forget(state);
}

// Called when all computation has been issued, so that no sum is queued ahead of it.
void MirrorExchange::sum_now(StageState& state) {
  reduction_stream(state).wait(device_.compute().record());
  run(state, [this, &state] { complete(state); });
}

void MirrorExchange::cancel() noexcept {
  for (auto& [stage, state] : stages_) state.thread.reset();
  try {
    hold_back_computation();
  } catch (const std::exception&) {
    // The device is broken.
  }
  for (auto& [stage, state] : stages_) forget(state);
}

// Returns the gradients to the compute stream, including those whose memory was allocated on a
// reduction stream.
void MirrorExchange::hold_back_computation() {
  for (const auto& [stage, state] : stages_) {
    device_.compute().wait(reduction_stream(state).record());
    for (const at::Tensor& tensor : state.adopted) {
      const c10::impl::VirtualGuardImpl streams(tensor.device().type());
      tensor.record_stream(streams.getStream(tensor.device()));
    }
  }
}

void MirrorExchange::forget(StageState& state) {
  state.started = false;
  state.num_launched = 0;
  state.num_begun = 0;
  state.incoming.clear();
  state.left.clear();
  state.adopted.clear();
}

void MirrorExchange::begin(StageState& state, std::size_t num_buckets) {
  for (; state.num_begun < num_buckets; ++state.num_begun) {
    const MessageId id{.kind = kind_of(state.stage),
                       .stage = state.stage,
                       .microbatch = Microbatch(static_cast<std::int32_t>(state.num_begun))};
    if (receives(state)) state.incoming.push_back(transport_.receive(mirror_, id));
    if (!sends(state)) continue;
    Message own = outgoing(state.buckets[state.num_begun]);
    state.left.push_back(
        transport_.send(mirror_, id, std::move(own), reduction_stream(state).record()));
  }
}

void MirrorExchange::complete(StageState& state) {
  Message before;  // kept until the next one is requested, which thus takes other memory
  for (std::size_t i = 0; i < state.buckets.size(); ++i) {
    begin(state, std::min(state.buckets.size(), kAhead + i));
    // The receive first: its memory is free once the reduction stream has finished its earlier
    // work. If both mirrors waited on that stream for their own sends, neither would receive.
    Arrival arrival = receives(state) ? state.incoming[i]->wait() : Arrival{};
    if (sends(state)) reduction_stream(state).wait(state.left[i]);
    if (!receives(state)) continue;
    reduction_stream(state).wait(arrival.ready);
    apply(state, state.buckets[i], tensors_of(arrival.message, options_.message_device, false));
    before = std::move(arrival.message);
  }
}

Message MirrorExchange::outgoing(const Tensors& bucket) const {
  const bool gradients = options_.mode == Mode::kSumGradients;
  return message_of(gradients ? gradients_of(bucket) : bucket, options_.message_device);
}

void MirrorExchange::apply(StageState& state, const Tensors& bucket, const Tensors& theirs) {
  DUALPIPE_CHECK(bucket.size() == theirs.size(), "stage ", state.stage, ": a bucket of ",
                 bucket.size(), " tensors met one of ", theirs.size());
  for (std::size_t i = 0; i < bucket.size(); ++i) {
    if (options_.mode == Mode::kSumGradients) {
      add_gradient(state, bucket[i], theirs[i]);
    } else {
      at::Tensor(bucket[i]).copy_(theirs[i]);
    }
  }
}

void MirrorExchange::add_gradient(StageState& state, const at::Tensor& parameter,
                                  const at::Tensor& theirs) {
  if (!theirs.defined()) return;
  at::Tensor& mine = parameter.mutable_grad();
  if (mine.defined()) {
    mine.add_(theirs.to(mine.device()));
    return;
  }
  mine = theirs.clone().to(parameter.device());
  if (!mine.is_cpu()) state.adopted.push_back(mine);
}

MessageKind MirrorExchange::kind_of(Stage stage) const {
  const bool low = 2 * stage.value() < options_.num_ranks;
  return low ? MessageKind::kMirrorLow : MessageKind::kMirrorHigh;
}

Stream& MirrorExchange::reduction_stream(const StageState& state) const {
  return device_.reduction(reduction_of(kind_of(state.stage)));
}

bool MirrorExchange::sends(const StageState& state) const {
  return options_.mode == Mode::kSumGradients || is_first_copy(state);
}

bool MirrorExchange::receives(const StageState& state) const {
  return options_.mode == Mode::kSumGradients || !is_first_copy(state);
}

bool MirrorExchange::is_first_copy(const StageState& state) const {
  return state.stage.value() == options_.rank.value();
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
