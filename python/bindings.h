#pragma once

#include <pybind11/pybind11.h>

namespace dualpipe {

// One function for each part of the core, in bind_<part>.cpp: it adds that part's classes and
// functions to the module. Bindings hold no logic, and release the interpreter lock around calls
// that block.
void bind_errors(pybind11::module_& module);
void bind_schedule(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_weight_grad(pybind11::module_& module);
void bind_comm(pybind11::module_& module);

}  // namespace dualpipe
