#include "bindings.h"
#include "common/error.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

void translate_user_errors(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const TypeMismatch& error) {
    py::set_error(PyExc_TypeError, error.what());
  } catch (const UserError& error) {
    py::set_error(PyExc_ValueError, error.what());
  }
}

template <typename Error>
void add_error(py::module_& module, const char* name, PyObject* base, const char* doc) {
  py::register_local_exception<Error>(module, name, base).attr("__doc__") = doc;
}

}  // namespace

// The translator registered last is tried first: derived errors are registered after their bases.
// Local translators act only in this module, and leave the errors of other extensions to those.
void bind_errors(py::module_& module) {
  py::register_local_exception_translator(&translate_user_errors);
  add_error<ScheduleError>(module, "ScheduleError", PyExc_ValueError,
                           "A schedule that cannot be built, parsed or proved.");
  add_error<PipelineError>(module, "PipelineError", PyExc_RuntimeError,
                           "A rank or a link of the pipeline failed.");
  add_error<InternalError>(module, "InternalError", PyExc_RuntimeError,
                           "A bug of this library; please report it.");
}

}  // namespace dualpipe
