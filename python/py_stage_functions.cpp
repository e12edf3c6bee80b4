#include "py_stage_functions.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "py_error.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

py::object to_python(const at::Tensor& tensor) {
  return tensor.defined() ? py::cast(tensor) : py::none();
}

py::list to_python(const Tensors& tensors) {
  py::list list(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) list[i] = to_python(tensors[i]);
  return list;
}

at::Tensor tensor_from(const py::handle& object) {
  return object.is_none() ? at::Tensor() : object.cast<at::Tensor>();
}

// (outputs, loss), as dualpipe_ext/_step.py returns it.
StageFunctions::Result result_from(const py::object& returned) {
  const auto pair = returned.cast<py::tuple>();
  StageFunctions::Result result;
  for (const py::handle item : pair[0]) result.outputs.push_back(tensor_from(item));
  result.loss = tensor_from(pair[1]);
  return result;
}

}  // namespace

PyStageFunctions::PyStageFunctions(py::object functions)
    : forward_(functions.attr("forward")), overlapped_(functions.attr("overlapped")) {}

StageFunctions::Result PyStageFunctions::forward(Stage stage, Microbatch microbatch,
                                                 const Tensors& inputs) {
  const py::gil_scoped_acquire locked;
  return result_from(call_python(forward_, stage.value(), microbatch.value(), to_python(inputs)));
}

StageFunctions::Result PyStageFunctions::overlapped(const Overlap& work) {
  const py::gil_scoped_acquire locked;
  return result_from(call_python(
      overlapped_,
      py::make_tuple(work.forward_stage.value(), work.forward_microbatch.value(),
                     to_python(work.inputs)),
      py::make_tuple(work.backward_stage.value(), work.backward_microbatch.value(),
                     to_python(work.loss), to_python(work.outputs), to_python(work.output_grads))));
}

// Of an exception of Python's, torch's own says only the words, without its type and place.
void PyStageFunctions::differentiate(const std::function<void()>& work) {
  try {
    work();
  } catch (python_error& error) {
    const py::gil_scoped_acquire locked;
    error.restore();
    throw DescribedError(py::error_already_set());
  }
}

}  // namespace dualpipe
