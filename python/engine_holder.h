#pragma once

#include <chrono>
#include <memory>

#include "comm/watchdog.h"
#include "delete_unlocked.h"
#include "engine/engine.h"
#include "interrupts.h"

namespace dualpipe {

using EngineHolder = std::unique_ptr<Engine, DeleteUnlocked>;

// Those of every engine of Python's: Ctrl-C ends its waits.
inline Watchdog::Options watchdog_options(std::chrono::milliseconds timeout) {
  Watchdog::Options options;
  options.timeout = timeout;
  options.interrupted = &InterruptScope::interrupted;
  return options;
}

}  // namespace dualpipe
