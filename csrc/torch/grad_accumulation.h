#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

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
[[nodiscard]] const void* identity_of(const GradTarget& target);

[[nodiscard]] bool has_hooks(const at::Tensor& parameter);

void accumulate(const GradTarget& target, const at::Tensor& grad);

// Adds left @ right; in one kernel where the types allow.
void accumulate_product(const GradTarget& target, const at::Tensor& left, const at::Tensor& right);

// Adds what autograd left in .grad to main_grad, unless there is none or both are one memory.
void move_to_main_grad(const GradTarget& target);

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

}  // namespace dualpipe
