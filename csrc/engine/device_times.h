#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "device/device.h"
#include "engine/trace.h"

namespace dualpipe {

// When the device did what the executor issued: marks in the compute stream around each
// computation of a step, read when somebody asks.
class DeviceTimes {
 public:
  // The step begins.
  explicit DeviceTimes(std::unique_ptr<Stopwatch> stopwatch);

  void begin_computation();
  void end_wait();  // the stream waits for no message of this computation any more, or for others
  void end_computation();
  void end_step();

  // Puts the device's times in the place of the host's. Blocks until the device is done with the
  // step.
  void write_to(Trace& trace);

 private:
  using Mark = std::size_t;
  struct Computation {
    Mark start = 0;
    Mark ready = 0;  // the start, where it waits for nothing
    Mark end = 0;
  };
  Mark mark();

  std::unique_ptr<Stopwatch> stopwatch_;
  Mark num_marks_ = 0;
  std::vector<Computation> computations_;
};

}  // namespace dualpipe
