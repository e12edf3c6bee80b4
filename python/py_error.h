#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>

namespace dualpipe {

// A Python exception whose what() is written for the other ranks: its words, and where in the
// user's own code it was raised (dualpipe_ext/_failure.py). In Python it is the exception itself.
class DescribedError final : public pybind11::error_already_set {
 public:
  // With the interpreter lock.
  explicit DescribedError(const pybind11::error_already_set& error);

  [[nodiscard]] const char* what() const noexcept override { return text_->c_str(); }

 private:
  std::shared_ptr<const std::string> text_;  // copies of exceptions must not throw
};

// function(arguments...), with the interpreter lock; what it raises is a DescribedError.
template <typename... Arguments>
pybind11::object call_python(const pybind11::object& function, Arguments&&... arguments) {
  try {
    return function(std::forward<Arguments>(arguments)...);
  } catch (const pybind11::error_already_set& error) {
    throw DescribedError(error);
  }
}

}  // namespace dualpipe
