#include <iomanip>
#include <sstream>

#include "schedule/sim/simulate.h"

namespace dualpipe {
namespace {

const char* category(Op op) {
  switch (op) {
    case Op::kForward:
      return "forward";
    case Op::kOverlap:
      return "overlap";
    case Op::kBackwardWeight:
      return "weight";
    default:
      return "backward";
  }
}

}  // namespace

// Complete events ("ph": "X") of the Trace Event Format, and a name for each rank's thread. Action
// texts hold no character that JSON would have to escape.
std::string to_chrome_trace(const Timeline& timeline, double microseconds_per_unit) {
  std::ostringstream out;
  out << std::setprecision(15) << "{\"traceEvents\":[";
  for (std::size_t rank = 0; rank < timeline.ranks.size(); ++rank) {
    out << (rank == 0 ? "\n" : ",\n") << R"({"ph":"M","name":"thread_name","pid":0,"tid":)" << rank
        << R"(,"args":{"name":"rank )" << rank << "\"}}";
    for (const Span& span : timeline.ranks[rank]) {
      out << ",\n"
          << R"({"ph":"X","name":")" << to_string(span.action) << R"(","cat":")"
          << category(span.action.op()) << R"(","pid":0,"tid":)" << rank
          << ",\"ts\":" << span.start * microseconds_per_unit
          << ",\"dur\":" << (span.end - span.start) * microseconds_per_unit << "}";
    }
  }
  out << "\n],\"displayTimeUnit\":\"ms\"}\n";
  return out.str();
}

}  // namespace dualpipe
