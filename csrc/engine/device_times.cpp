#include "engine/device_times.h"

#include "common/error.h"

namespace dualpipe {

DeviceTimes::DeviceTimes(std::unique_ptr<Stopwatch> stopwatch) : stopwatch_(std::move(stopwatch)) {
  mark();
}

DeviceTimes::Mark DeviceTimes::mark() {
  stopwatch_->mark();
  return num_marks_++;
}

void DeviceTimes::begin_computation() {
  const Mark start = mark();
  computations_.push_back({start, start, start});
}

void DeviceTimes::end_wait() { computations_.back().ready = mark(); }

void DeviceTimes::end_computation() { computations_.back().end = mark(); }

void DeviceTimes::end_step() { mark(); }

void DeviceTimes::write_to(Trace& trace) {
  const std::vector<std::int64_t> times = stopwatch_->read();
  DUALPIPE_CHECK(times.size() == num_marks_ && computations_.size() == trace.events.size(),
                 times.size(), " times of ", num_marks_, " marks, ", computations_.size(),
                 " computations of ", trace.events.size());
  for (std::size_t i = 0; i < computations_.size(); ++i) {
    const auto [start, ready, end] = computations_[i];
    TraceEvent& event = trace.events[i];
    event.start_ns = times[start];
    event.end_ns = times[end];
    event.wait_ns = times[ready] - times[start];
  }
  trace.duration_ns = times.back();
  trace.clock = Clock::kDevice;
}

}  // namespace dualpipe
