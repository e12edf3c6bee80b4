#pragma once

#include <string_view>

namespace dualpipe {

// Has the threads of this process that bear this name wait for a free core, or for the end of
// somebody's time slice, instead of taking a core from a thread that runs (Linux: SCHED_BATCH;
// needs no privilege, and leaves threads alone whose policy somebody has chosen). Returns how many
// of them do now.
int never_preempt(std::string_view thread_name) noexcept;

}  // namespace dualpipe
