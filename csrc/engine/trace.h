#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "schedule/action.h"

namespace dualpipe {

class DeviceTimes;

// Whose clock the times are from. A host that runs ahead of its device only knows when it issued
// the work. On the device's clock, the step begins when its stream gets there and ends after the
// last computation of this rank.
enum class Clock : std::uint8_t { kHost, kDevice };

// One computation of a step as it happened. Times in nanoseconds since the step began.
struct TraceEvent {
  Action action;
  std::int64_t start_ns = 0;
  std::int64_t end_ns = 0;
  std::int64_t wait_ns = 0;  // the part of that time spent blocked on messages
};

// What one rank did in one step; the measured counterpart of Timeline (schedule/sim/simulate.h).
struct Trace {
  std::vector<TraceEvent> events;
  std::int64_t duration_ns = 0;  // the whole step, the commit included
  int peak_live_activations = 0;
  Clock clock = Clock::kHost;
  // Set until the device's times have been read; until then the times above are the host's.
  std::shared_ptr<DeviceTimes> device_times;

  // Nanoseconds spent computing, without waits.
  [[nodiscard]] std::int64_t busy_ns() const;
};

// Nanoseconds on the steady clock.
[[nodiscard]] inline std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace dualpipe
