#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "engine/engine.h"

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

}  // namespace dualpipe
