#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>
#include <vector>

#include "torch/wide_product.h"

namespace dualpipe {

// A leaf parameter and where its gradient goes: .grad, or main_grad if that is defined.
struct GradTarget {
  at::Tensor parameter;
  at::Tensor main_grad;

  [[nodiscard]] const at::Tensor& sum() const {
    return main_grad.defined() ? main_grad : parameter.grad();
  }
};

// What WeightTargets call it: a parameter's .grad may not be there yet.
[[nodiscard]] inline const void* identity_of(const GradTarget& target) {
  return target.main_grad.defined()
             ? target.main_grad.const_data_ptr()
             : static_cast<const void*>(target.parameter.unsafeGetTensorImpl());
}

// Gradients of parameters with hooks. Hooks belong to autograd, which alone knows when and in what
// order to call them: flush() hands it one gradient a parameter. What the hooks leave in .grad
// moves on to main_grad.
class HookedGrads {
 public:
  void add(const GradTarget& target, const at::Tensor& grad);
  void flush();

 private:
  std::vector<std::pair<GradTarget, at::Tensor>> sums_;
};

// Between construction and flush() the hooked gradients of this thread's tasks are summed here.
class HookedGradsScope {
 public:
  HookedGradsScope() : outer_(std::exchange(current(), &grads_)) {}
  ~HookedGradsScope() { current() = outer_; }
  HookedGradsScope(const HookedGradsScope&) = delete;
  HookedGradsScope& operator=(const HookedGradsScope&) = delete;

  void flush() { grads_.flush(); }
  static HookedGrads*& current() {
    static thread_local HookedGrads* grads = nullptr;
    return grads;
  }

 private:
  HookedGrads grads_;
  HookedGrads* outer_;
};

inline void HookedGrads::add(const GradTarget& target, const at::Tensor& grad) {
  const at::Tensor own = grad.to(target.parameter.scalar_type());
  for (auto& [known, sum] : sums_) {
    if (known.parameter.is_same(target.parameter)) {
      sum.add_(own);
      return;
    }
  }
  sums_.emplace_back(target, own);
}

inline void HookedGrads::flush() {
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
  for (const auto& [target, sum] : sums) {
    at::Tensor& grad = target.parameter.mutable_grad();
    if (target.main_grad.defined() && grad.defined()) {
      target.main_grad.add_(grad);
      grad.reset();
    }
  }
}

// The collector of the backward pass at work on this thread, flushed at the end of the pass.
inline std::shared_ptr<HookedGrads> hooked_grads_of_pass() {
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

inline void add_through_hooks(const GradTarget& target, const at::Tensor& grad) {
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

[[nodiscard]] inline bool has_hooks(const at::Tensor& parameter) {
  namespace impl = torch::autograd::impl;
  if (!impl::hooks(parameter).empty() || impl::post_acc_grad_hooks(parameter)) return true;
  const auto node = impl::try_get_grad_accumulator(parameter);
  return node && (!node->pre_hooks().empty() || !node->post_hooks().empty());
}

// A first gradient has the type and the strides of its parameter, as autograd leaves it.
[[nodiscard]] inline at::Tensor as_grad_of(const at::Tensor& parameter, const at::Tensor& grad) {
  if (parameter.strides() == grad.strides()) return grad.to(parameter.scalar_type());
  return at::empty_like(parameter.detach()).copy_(grad);
}

inline void accumulate(const GradTarget& target, const at::Tensor& grad) {
  if (has_hooks(target.parameter)) return add_through_hooks(target, grad);
  if (target.sum().defined()) {
    target.sum().add_(grad);
  } else {
    target.parameter.mutable_grad() = as_grad_of(target.parameter, grad);
  }
}

// A .grad gets what autograd would add to it; main_grad is there for what that rounds away.
[[nodiscard]] inline bool takes_products(const GradTarget& target, const at::Tensor& factor) {
  const at::Tensor& sum = target.sum();
  if (has_hooks(target.parameter) || !sum.defined()) return false;
  if (sum.scalar_type() == factor.scalar_type()) return true;
  return target.main_grad.defined() &&
         c10::promoteTypes(sum.scalar_type(), factor.scalar_type()) == sum.scalar_type();
}

// Adds left @ right; in one kernel where the types allow.
inline void accumulate_product(const GradTarget& target, const at::Tensor& left,
                               const at::Tensor& right) {
  if (takes_products(target, left)) {
    add_product(target.sum(), left, right);
  } else {
    accumulate(target, at::mm(left, right));
  }
}

}  // namespace dualpipe
