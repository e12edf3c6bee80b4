#pragma once

#include <c10/core/GradMode.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "py_error.h"

namespace dualpipe {

// A Python function as a task of a WeightQueue: copied, called and destroyed on any thread, with or
// without the interpreter lock. Called without gradients, as autograd calls a backward.
class PyTask {
 public:
  explicit PyTask(pybind11::function function)
      : function_(new pybind11::function(std::move(function)), &drop) {}

  void operator()() const {
    const pybind11::gil_scoped_acquire locked;
    const c10::AutoGradMode no_grad(false);
    call_python(*function_);
  }

 private:
  // After the interpreter's end there is no lock to take: what is left then is leaked.
  static void drop(pybind11::function* function) {
    if (Py_IsInitialized() == 0) return;
    const pybind11::gil_scoped_acquire locked;
    delete function;
  }

  std::shared_ptr<pybind11::function> function_;
};

}  // namespace dualpipe
