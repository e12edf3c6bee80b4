#include "engine/trace.h"

namespace dualpipe {

std::int64_t Trace::busy_ns() const {
  std::int64_t busy = 0;
  for (const TraceEvent& event : events) busy += event.end_ns - event.start_ns - event.wait_ns;
  return busy;
}

}  // namespace dualpipe
