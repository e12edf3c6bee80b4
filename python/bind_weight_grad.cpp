#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "bindings.h"
#include "py_task.h"
#include "torch/deferred_linear.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

// The context manager that WeightQueue.scope() returns.
class ScopeManager {
 public:
  explicit ScopeManager(std::shared_ptr<WeightQueue> queue) : queue_(std::move(queue)) {}
  void enter() { scope_.emplace(queue_); }
  void exit(const py::args&) { scope_.reset(); }

 private:
  std::shared_ptr<WeightQueue> queue_;
  std::optional<WeightQueueScope> scope_;
};

// Raises what a hook raised inside autograd's engine, and torch's own errors with their own types.
void translate_torch_errors(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (python_error& error) {
    error.restore();
  } catch (const c10::Error&) {
    torch::translate_exception_to_python(pointer);
  }
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, bool transposed,
                  const std::optional<at::Tensor>& weight_main_grad,
                  const std::optional<at::Tensor>& bias_main_grad, bool sharded) {
  return deferred_linear(input, {.weight = weight,
                                 .bias = bias.value_or(at::Tensor()),
                                 .weight_main_grad = weight_main_grad.value_or(at::Tensor()),
                                 .bias_main_grad = bias_main_grad.value_or(at::Tensor()),
                                 .transposed = transposed,
                                 .sharded = sharded});
}

void bind_queue(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<ScopeManager>(module, "WeightQueueScope", "Makes a queue this thread's current one.")
      .def("__enter__", &ScopeManager::enter)
      .def("__exit__", &ScopeManager::exit);

  py::class_<WeightQueue, std::shared_ptr<WeightQueue>>(
      module, "WeightQueue",
      "Deferred weight gradients, first in, first out within a (stage, micro-batch).")
      .def(py::init<>())
      .def(
          "begin_backward",
          [](WeightQueue& queue, int stage, int microbatch, bool defer) {
            queue.begin_backward(Stage(stage), Microbatch(microbatch), defer);
          },
          py::arg("stage"), py::arg("microbatch"), py::arg("defer"),
          "Until end_backward: whether weight gradients are deferred (I) or computed at once (B).")
      .def("end_backward", &WeightQueue::end_backward)
      .def(
          "put",
          [](WeightQueue& queue, py::function function) { queue.put(PyTask(std::move(function))); },
          py::arg("function"), "Defers a call of the function to the W of the pass at work.")
      .def(
          "run",
          [](WeightQueue& queue, int stage, int microbatch) {
            run_weight_gradients(queue, Stage(stage), Microbatch(microbatch));
          },
          py::arg("stage"), py::arg("microbatch"), Unlocked(),
          "Runs what the pass of a stage and micro-batch deferred (W), and forgets it.")
      .def("clear", &WeightQueue::clear, "Forgets everything, as after a failed step.")
      .def(
          "scope",
          [](std::shared_ptr<WeightQueue> queue) {
            return std::make_unique<ScopeManager>(std::move(queue));
          },
          "A context manager that makes this the current queue of the thread.")
      .def_property_readonly("deferring", &WeightQueue::deferring)
      .def_property_readonly("num_pending", &WeightQueue::num_pending);
}

}  // namespace

void bind_weight_grad(py::module_& module) {
  py::register_local_exception_translator(&translate_torch_errors);
  bind_queue(module);
  module.def("current_weight_queue", &current_weight_queue,
             "The queue that this thread's backward passes defer to; None outside of an engine.");
  module.def("deferred_linear", &linear, py::arg("input"), py::arg("weight"),
             py::arg("bias").none(true), py::arg("transposed") = false,
             py::arg("weight_main_grad") = py::none(), py::arg("bias_main_grad") = py::none(),
             py::arg("sharded") = false, py::call_guard<py::gil_scoped_release>(),
             "A linear layer that leaves the gradients of its parameters to the current queue.");
}

}  // namespace dualpipe
