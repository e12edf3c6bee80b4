#pragma once

#include <pybind11/pybind11.h>

#include <functional>

#include "torch/torch_stage_runner.h"

namespace dualpipe {

// StageFunctions whose methods are those of a Python object (dualpipe_ext/_step.py). Holds the
// interpreter lock inside the calls alone. Must be destroyed with the lock held.
class PyStageFunctions final : public StageFunctions {
 public:
  explicit PyStageFunctions(pybind11::object functions);

  [[nodiscard]] Result forward(Stage stage, Microbatch microbatch, const Tensors& inputs) override;
  [[nodiscard]] Result overlapped(const Overlap& work) override;
  void differentiate(const std::function<void()>& work) override;

 private:
  pybind11::object forward_;
  pybind11::object overlapped_;
};

}  // namespace dualpipe
