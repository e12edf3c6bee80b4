#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "comm/control_plane.h"
#include "comm/transport.h"

namespace dualpipe {

// What the watchdog needs to know. Called by the watchdog's thread at any time in a step.
class Progress {
 public:
  virtual ~Progress() = default;
  // How long the rank has been blocked in one wait for a message; zero while it computes.
  [[nodiscard]] virtual std::chrono::nanoseconds waiting() const = 0;
  // "action 31 of 94 (2F5): waits for the activation of micro-batch 5 from rank 1"
  [[nodiscard]] virtual std::string position() const = 0;
};

// One thread per rank that ends a step which cannot continue: when another rank has reported a
// failure, when the transport reports a fault, when this rank is to stop, or when it has waited for
// one message longer than `timeout` (it then publishes its position, gathers those of the others,
// and reports). It aborts the transport and idles until the next arm(). After a step it watches
// until the device has finished working. While idle it costs nothing.
class Watchdog {
 public:
  struct Options {
    std::chrono::milliseconds poll_interval{100};
    std::chrono::milliseconds timeout{600'000};
    // Called at every poll of a step: whether this rank is to stop, for example after Ctrl-C.
    std::function<bool()> interrupted = [] { return false; };
  };

  Watchdog(Rank rank, Transport& transport, ControlPlane& control, Options options);
  ~Watchdog();  // joins its thread; leaks in a forked child, which lacks it; never throws

  // At the start of a step. A failure of a later step does not end this one: the rank that failed
  // has already committed this step, and so will everybody.
  void arm(const Progress& progress, std::int64_t step);
  void disarm();  // at its end; when it returns, progress is not used any more

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dualpipe
