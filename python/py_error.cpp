#include "py_error.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

std::string describe(const py::error_already_set& error) {
  try {
    const py::object function = py::module_::import("dualpipe_ext._failure").attr("describe");
    const py::object trace = error.trace() ? error.trace() : py::none();
    return function(error.value(), trace).cast<std::string>();
  } catch (const std::exception&) {
    return error.what();  // the interpreter is shutting down, or out of memory or stack
  }
}

}  // namespace

DescribedError::DescribedError(const py::error_already_set& error)
    : py::error_already_set(error), text_(std::make_shared<const std::string>(describe(error))) {}

}  // namespace dualpipe
