#pragma once

#include <pybind11/pybind11.h>

#include "common/error.h"

namespace dualpipe {

// While one of these lives on Python's main thread, a SIGINT that raises KeyboardInterrupt is noted
// for the engine's watchdog as well: the interpreter, which is waited for, could only look at it
// when the step is over. A handler of the user's own, which may well let the step end, is left
// alone. Scopes may nest: a criterion may run a pipeline of its own. With the interpreter lock.
class InterruptScope {
 public:
  InterruptScope();
  ~InterruptScope();
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;

  // Whether one came since the oldest scope that lives. Any thread.
  [[nodiscard]] static bool interrupted();

 private:
  const bool is_main_thread_;
};

// Raises in Python what the handler of a signal raises, if one came. With the interpreter lock.
void raise_interrupt();

// Runs what waits for other ranks, without the interpreter lock. What Ctrl-C raises comes before
// the failure that it makes.
template <typename Work>
auto interruptible(const Work& work) {
  const InterruptScope scope;
  try {
    const pybind11::gil_scoped_release unlocked;
    return work();
  } catch (const PipelineError&) {
    if (InterruptScope::interrupted()) raise_interrupt();
    throw;
  }
}

}  // namespace dualpipe
