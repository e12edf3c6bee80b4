#include "bindings.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The native core of dualpipe_ext.";
  module.attr("version") = "0.1.0";
  dualpipe::bind_errors(module);
  dualpipe::bind_schedule(module);
  dualpipe::bind_comm(module);
  dualpipe::bind_weight_grad(module);
  dualpipe::bind_engine(module);
  for (const auto bind : dualpipe::PartOfModule::all()) bind(module);
}
