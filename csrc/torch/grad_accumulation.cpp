#include "torch/grad_accumulation.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>

#include "torch/wide_product.h"

namespace dualpipe {
namespace {

// The collector of the backward pass at work on this thread, flushed at the end of the pass.
std::shared_ptr<HookedGrads> hooked_grads_of_pass() {
  namespace autograd = torch::autograd;
  static thread_local int last_pass = -1;
  static thread_local std::weak_ptr<HookedGrads> last_grads;
  std::shared_ptr<HookedGrads> grads = last_grads.lock();
  const int pass = autograd::get_current_graph_task_id();
  if (!grads || pass != last_pass) {
    grads = std::make_shared<HookedGrads>();
    autograd::Engine::get_default_engine().queue_callback([grads] { grads->flush(); });
    last_grads = grads;
    last_pass = pass;
  }
  return grads;
}

void add_through_hooks(const GradTarget& target, const at::Tensor& grad) {
  if (HookedGrads* grads = HookedGradsScope::current()) {
    grads->add(target, grad);
  } else if (torch::autograd::get_current_graph_task_id() >= 0) {
    hooked_grads_of_pass()->add(target, grad);
  } else {
    HookedGrads alone;
    alone.add(target, grad);
    alone.flush();
  }
}

// A first gradient has the type and the strides of its parameter, as autograd leaves it.
at::Tensor as_grad_of(const at::Tensor& parameter, const at::Tensor& grad) {
  if (parameter.strides() == grad.strides()) return grad.to(parameter.scalar_type());
  return at::empty_like(parameter.detach()).copy_(grad);
}

// A .grad gets what autograd would add to it; main_grad is there for what that rounds away.
bool takes_products(const GradTarget& target, const at::Tensor& factor) {
  const at::Tensor& sum = target.sum();
  if (has_hooks(target.parameter) || !sum.defined()) return false;
  // A DTensor's product may be placed otherwise than its sum, which takes an addition of its own.
  if (sum.key_set().has(c10::DispatchKey::Python)) return false;
  if (sum.scalar_type() == factor.scalar_type()) return true;
  return target.main_grad.defined() &&
         c10::promoteTypes(sum.scalar_type(), factor.scalar_type()) == sum.scalar_type();
}

}  // namespace

const void* identity_of(const GradTarget& target) {
  return target.main_grad.defined()
             ? target.main_grad.const_data_ptr()
             : static_cast<const void*>(target.parameter.unsafeGetTensorImpl());
}

bool has_hooks(const at::Tensor& parameter) {
  namespace impl = torch::autograd::impl;
  if (!impl::hooks(parameter).empty() || impl::post_acc_grad_hooks(parameter)) return true;
  const auto node = impl::try_get_grad_accumulator(parameter);
  return node && (!node->pre_hooks().empty() || !node->post_hooks().empty());
}

void accumulate(const GradTarget& target, const at::Tensor& grad) {
  if (has_hooks(target.parameter)) return add_through_hooks(target, grad);
  if (target.sum().defined()) {
    target.sum().add_(grad);
  } else {
    target.parameter.mutable_grad() = as_grad_of(target.parameter, grad);
  }
}

void accumulate_product(const GradTarget& target, const at::Tensor& left, const at::Tensor& right) {
  if (takes_products(target, left)) {
    add_product(target.sum(), left, right);
  } else {
    accumulate(target, at::mm(left, right));
  }
}

void move_to_main_grad(const GradTarget& target) {
  at::Tensor& grad = target.parameter.mutable_grad();
  if (!target.main_grad.defined() || !grad.defined()) return;
  if (grad.const_data_ptr() == target.main_grad.const_data_ptr()) return;
  const at::NoGradGuard no_grad;
  target.main_grad.add_(grad);
  grad.reset();
}

void HookedGrads::add(const GradTarget& target, const at::Tensor& grad) {
  const at::Tensor own = grad.to(target.parameter.scalar_type());
  for (auto& [known, sum] : sums_) {
    if (known.parameter.is_same(target.parameter)) {
      sum.add_(own);
      return;
    }
  }
  sums_.emplace_back(target, own);
}

void HookedGrads::flush() {
  namespace autograd = torch::autograd;
  if (sums_.empty()) return;
  const auto sums = std::exchange(sums_, {});
  autograd::edge_list roots;
  autograd::variable_list grads;
  for (const auto& [target, sum] : sums) {
    roots.push_back(autograd::impl::gradient_edge(target.parameter));
    grads.push_back(sum);
  }
  autograd::Engine::get_default_engine().execute(roots, grads, /*keep_graph=*/false,
                                                 /*create_graph=*/false, /*accumulate_grad=*/true);
  for (const auto& [target, sum] : sums) move_to_main_grad(target);
}

}  // namespace dualpipe
