#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

namespace dualpipe {

// One function for each part of the core, in bind_<part>.cpp: it adds that part's classes and
// functions to the module. Bindings hold no logic, and release the interpreter lock around calls
// that block.
void bind_errors(pybind11::module_& module);
void bind_schedule(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_weight_grad(pybind11::module_& module);
void bind_comm(pybind11::module_& module);

// A part that is in some builds only adds itself: a static PartOfModule in its file.
struct PartOfModule {
  using Bind = void (*)(pybind11::module_& module);
  explicit PartOfModule(Bind bind) { all().push_back(bind); }
  static std::vector<Bind>& all() {
    static std::vector<Bind> parts;
    return parts;
  }
};

// A duration that the user gave in seconds. At most 1e9 s (30 years), also for infinity: adding it
// to the time of day, in nanoseconds, cannot overflow.
inline std::chrono::milliseconds milliseconds_of(double seconds) {
  constexpr double kLongest = 1e9;
  const double limited = seconds < kLongest ? std::max(seconds, 0.0) : kLongest;
  return std::chrono::milliseconds(static_cast<std::int64_t>(limited * 1000));
}

// Strong ids of the numbers that Python has for them.
template <typename Id>
std::vector<Id> ids_of(const std::vector<int>& numbers) {
  std::vector<Id> ids;
  for (const int number : numbers) ids.emplace_back(number);
  return ids;
}

}  // namespace dualpipe
