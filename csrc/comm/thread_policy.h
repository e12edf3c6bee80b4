#pragma once

#include <string_view>

namespace dualpipe {

// Makes the threads of this process with this name wait for a free core, or for the end of a time
// slice, instead of preempting a running thread (Linux: SCHED_BATCH; needs no privilege). Leaves
// threads alone whose policy somebody has chosen. Returns how many threads wait like this now.
int never_preempt(std::string_view thread_name) noexcept;

}  // namespace dualpipe
