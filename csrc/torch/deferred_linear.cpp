#include "torch/deferred_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <optional>
#include <string_view>
#include <type_traits>

#include "torch/grad_accumulation.h"
#include "torch/no_autocast.h"

namespace dualpipe {
namespace {

namespace autograd = torch::autograd;

// A slot of torch's own thread-local state, which autograd hands on to its threads. Older versions
// name slots by number, newer ones by the address of a name.
inline constexpr std::string_view kSlotName = "dualpipe::WeightQueue";

template <typename Kind>
Kind make_slot() {
  if constexpr (std::is_enum_v<Kind>) {
    return static_cast<Kind>(0xD9);
  } else {
    return Kind(&kSlotName);
  }
}

struct CurrentQueue final : c10::DebugInfoBase {
  explicit CurrentQueue(std::shared_ptr<WeightQueue> value) : queue(std::move(value)) {}
  std::shared_ptr<WeightQueue> queue;
};

at::Tensor rows(const at::Tensor& tensor) {
  return tensor.dim() == 1 ? tensor.unsqueeze(0) : tensor.flatten(0, -2);
}

// matrix [rows, n] in the shape of like [..., m]: [..., n].
at::Tensor with_leading_sizes(const at::Tensor& matrix, const at::Tensor& like) {
  std::vector<std::int64_t> sizes = like.sizes().vec();
  sizes.back() = matrix.size(-1);
  return at::_unsafe_view(matrix, sizes);
}

at::Tensor plain_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                        bool transposed) {
  if (!transposed) {
    return at::linear(input, weight, bias.defined() ? std::optional(bias) : std::nullopt);
  }
  const at::Tensor matrix = rows(input);
  const at::Tensor output =
      bias.defined() ? at::addmm(bias, matrix, weight) : at::mm(matrix, weight);
  return with_leading_sizes(output, input);
}

// Which of its parameters a call computes gradients of.
struct Wanted {
  bool weight;
  bool bias;
};

using NodePtr = decltype(autograd::Edge::function);

NodePtr accumulator_of(const at::Tensor& parameter) {
  if (!parameter.defined()) return nullptr;
  return autograd::impl::grad_accumulator(parameter);
}

// Whether the backward pass at work adds to the gradient behind an accumulator: not
// torch.autograd.grad, and with `inputs` given only for those.
bool pass_accumulates(const NodePtr& accumulator) {
  const auto* asked_for = autograd::get_current_graph_task_exec_info();
  if (asked_for == nullptr || asked_for->empty()) return true;
  const auto found = asked_for->find(accumulator.get());
  return found != asked_for->end() && found->second.needed_;
}

// False: hooks get the gradient, at the end of the W.
bool add_target(const GradTarget& target, WeightTargets& targets) {
  if (has_hooks(target.parameter)) return false;
  targets.push_back(identity_of(target));
  return true;
}

// What one call leaves to its backward beside the saved tensors.
struct DeferredCall final : torch::CustomClassHolder {
  DeferredCall(std::weak_ptr<WeightQueue> to, LinearParameters used)
      : queue(std::move(to)),
        parameters(std::move(used)),
        weight_accumulator(accumulator_of(parameters.weight)),
        bias_accumulator(accumulator_of(parameters.bias)),
        wanted{parameters.weight.requires_grad(),
               parameters.bias.defined() && parameters.bias.requires_grad()} {}

  [[nodiscard]] Wanted wanted_by_pass() const {
    return {wanted.weight && pass_accumulates(weight_accumulator),
            wanted.bias && pass_accumulates(bias_accumulator)};
  }

  [[nodiscard]] WeightTargets targets(Wanted now) const {
    WeightTargets targets;
    if (now.weight && !add_target({parameters.weight, parameters.weight_main_grad}, targets)) {
      return {};
    }
    if (now.bias && !add_target({parameters.bias, parameters.bias_main_grad}, targets)) return {};
    return targets;
  }

  void accumulate_grads(const at::Tensor& output_grad, const at::Tensor& input, Wanted now) const {
    const at::NoGradGuard no_grad;
    const NoAutocast no_autocast;
    const at::Tensor grads = rows(output_grad);
    if (now.weight) {
      const GradTarget weight{parameters.weight, parameters.weight_main_grad};
      const at::Tensor inputs = rows(input);
      parameters.transposed ? accumulate_product(weight, inputs.t(), grads)
                            : accumulate_product(weight, grads.t(), inputs);
    }
    if (now.bias) accumulate({parameters.bias, parameters.bias_main_grad}, grads.sum(0));
  }

  std::weak_ptr<WeightQueue> queue;  // an engine may be gone before a graph it made
  LinearParameters parameters;
  NodePtr weight_accumulator;  // kept, as an edge would: a pass finds no input without it
  NodePtr bias_accumulator;
  Wanted wanted;
};

using CallPtr = c10::intrusive_ptr<DeferredCall>;

// The operands of one call, in the type that autocast's policy for linear gives them. Its cache is
// not used: under no_grad it would keep copies without a graph for operations that need one.
struct Operands {
  Operands(const at::Tensor& x, const LinearParameters& parameters)
      : input(x), weight(parameters.weight), bias(parameters.bias) {
    const at::DeviceType device = x.device().type();
    if (!at::autocast::is_autocast_available(device)) return;
    if (!at::autocast::is_autocast_enabled(device)) return;
    const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
    for (at::Tensor* tensor : {&input, &weight, &bias}) {
      if (tensor->defined() && tensor->scalar_type() != dtype) {
        *tensor = at::autocast::cached_cast(dtype, tensor->detach(), device);
      }
    }
  }

  at::Tensor input;
  at::Tensor weight;
  at::Tensor bias;
};

// The parameters are no edges of this node: autograd would visit their accumulators, hooks
// included, with no gradient in every pass that defers.
class DeferredLinear : public autograd::Function<DeferredLinear> {
 public:
  // anchor gives an output that needs a gradient where the input does not.
  static at::Tensor forward(autograd::AutogradContext* context, const at::Tensor& input,
                            const std::optional<at::Tensor>& anchor, const CallPtr& call) {
    static_cast<void>(anchor);
    const Operands operands(input, call->parameters);
    const NoAutocast no_autocast;  // the operands are cast already, once
    const at::Tensor output =
        plain_linear(operands.input, operands.weight, operands.bias, call->parameters.transposed);
    // The weight is saved as it is: a cast copy for each micro-batch in flight would cost memory.
    context->save_for_backward({call->wanted.weight ? operands.input : at::Tensor(),
                                input.requires_grad() ? call->parameters.weight : at::Tensor()});
    context->set_materialize_grads(false);
    context->saved_data["call"] = c10::IValue::make_capsule(call);
    // A view made here could not be changed in place by whoever gets it.
    return output.is_view() ? at::_unsafe_view(output, output.sizes()) : output;
  }

  static autograd::variable_list backward(autograd::AutogradContext* context,
                                          const autograd::variable_list& output_grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !at::GradMode::is_enabled(),
        "a linear layer whose weight gradient is deferred cannot be differentiated twice, and this "
        "backward pass was asked for a graph; call it with create_graph=False, or defer no "
        "weight gradients, by DualPipeConfig(split_weight_gradients=False)");
    const at::Tensor& output_grad = output_grads[0];
    if (!output_grad.defined()) return {{}, {}, {}};
    const autograd::variable_list saved = context->get_saved_variables();
    const auto call =
        c10::static_intrusive_pointer_cast<DeferredCall>(context->saved_data["call"].toCapsule());
    defer_or_accumulate(call, output_grad, saved[0]);
    if (!context->needs_input_grad(0)) return {{}, {}, {}};
    return {input_grad(*call, output_grad, saved[1]), {}, {}};
  }

 private:
  static void defer_or_accumulate(const CallPtr& call, const at::Tensor& output_grad,
                                  const at::Tensor& saved_input) {
    const Wanted wanted = call->wanted_by_pass();
    if (!wanted.weight && !wanted.bias) return;
    // Without its history: a task keeps no graph alive.
    const at::Tensor input = saved_input.defined() ? saved_input.detach() : saved_input;
    const std::shared_ptr<WeightQueue> queue = call->queue.lock();
    if (queue && queue->deferring()) {
      queue->put([call, output_grad, input,
                  wanted] { call->accumulate_grads(output_grad, input, wanted); },
                 call->targets(wanted));
    } else {
      call->accumulate_grads(output_grad, input, wanted);
    }
  }

  static at::Tensor input_grad(const DeferredCall& call, const at::Tensor& output_grad,
                               const at::Tensor& saved_weight) {
    const NoAutocast no_autocast;
    const at::Tensor weight = saved_weight.to(output_grad.scalar_type());
    const at::Tensor grad =
        at::mm(rows(output_grad), call.parameters.transposed ? weight.t() : weight);
    return with_leading_sizes(grad, output_grad);
  }
};

bool can_own_grad(const at::Tensor& parameter, bool sharded) {
  if (!parameter.defined()) return true;
  const bool is_subclass = parameter.key_set().has(c10::DispatchKey::Python);
  return parameter.is_leaf() && (sharded || !is_subclass);
}

bool can_defer(const LinearParameters& parameters) {
  const bool wanted = parameters.weight.requires_grad() ||
                      (parameters.bias.defined() && parameters.bias.requires_grad());
  return wanted && at::GradMode::is_enabled() && parameters.weight.dim() == 2 &&
         !parameters.weight.is_complex() && can_own_grad(parameters.weight, parameters.sharded) &&
         can_own_grad(parameters.bias, parameters.sharded);
}

}  // namespace

WeightQueueScope::WeightQueueScope(std::shared_ptr<WeightQueue> queue)
    : guard_(make_slot<c10::DebugInfoKind>(), std::make_shared<CurrentQueue>(std::move(queue))) {}

std::shared_ptr<WeightQueue> current_weight_queue() {
  auto* info = c10::ThreadLocalDebugInfo::get(make_slot<c10::DebugInfoKind>());
  return info == nullptr ? nullptr : static_cast<CurrentQueue*>(info)->queue;
}

at::Tensor deferred_linear(const at::Tensor& input, const LinearParameters& parameters) {
  const std::shared_ptr<WeightQueue> queue = current_weight_queue();
  if (!queue || !can_defer(parameters)) {
    return plain_linear(input, parameters.weight, parameters.bias, parameters.transposed);
  }
  std::optional<at::Tensor> anchor;
  if (!input.requires_grad()) anchor = at::empty({0}).requires_grad_();
  return DeferredLinear::apply(input, anchor, c10::make_intrusive<DeferredCall>(queue, parameters));
}

void run_weight_gradients(WeightQueue& queue, Stage stage, Microbatch microbatch,
                          const WeightsAdvanced& advanced) {
  HookedGradsScope hooked;
  queue.run(stage, microbatch, advanced);
  hooked.flush();
}

}  // namespace dualpipe
