#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <memory>

#include "comm/watchdog.h"
#include "engine/engine.h"
#include "interrupts.h"

namespace dualpipe {

// The end of an engine waits for its threads and its device, and what it frees may be Python's:
// both want the interpreter lock to be free.
struct DeleteUnlocked {
  void operator()(Engine* engine) const {
    const pybind11::gil_scoped_release unlocked;
    delete engine;
  }
};
using EngineHolder = std::unique_ptr<Engine, DeleteUnlocked>;

// Those of every engine of Python's: Ctrl-C ends its waits.
inline Watchdog::Options watchdog_options(std::chrono::milliseconds timeout) {
  Watchdog::Options options;
  options.timeout = timeout;
  options.interrupted = &InterruptScope::interrupted;
  return options;
}

}  // namespace dualpipe
