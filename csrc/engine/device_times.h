#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "device/device.h"
#include "engine/trace.h"

namespace dualpipe {

// When the device executed what the executor issued: marks in the compute stream around each
// computation of a step, read on demand.
class DeviceTimes {
 public:
  // Marks the beginning of the step.
  explicit DeviceTimes(std::unique_ptr<Stopwatch> stopwatch);

  void begin_computation();
  void end_wait();  // after a wait for a message; a computation's last call counts
  void end_computation();
  void end_step();

  // Replaces the host's times with the device's. Blocks until the device has finished the step.
  void write_to(Trace& trace);

 private:
  using Mark = std::size_t;
  struct Computation {
    Mark start = 0;
    Mark ready = 0;  // equals start if it waits for nothing
    Mark end = 0;
  };
  Mark mark();

  std::unique_ptr<Stopwatch> stopwatch_;
  Mark num_marks_ = 0;
  std::vector<Computation> computations_;
};

}  // namespace dualpipe
