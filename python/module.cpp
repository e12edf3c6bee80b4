#include "bindings.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The native core of dualpipe_ext.";
  dualpipe::bind_errors(module);
  dualpipe::bind_schedule(module);
}
