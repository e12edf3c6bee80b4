#include "comm/thread_policy.h"

#include <sched.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace dualpipe {
namespace {

bool make_batch(pid_t thread) {
  const int policy = sched_getscheduler(thread);
  if (policy == SCHED_BATCH) return true;
  const sched_param no_priority{};
  return policy == SCHED_OTHER && sched_setscheduler(thread, SCHED_BATCH, &no_priority) == 0;
}

}  // namespace

int never_preempt(std::string_view thread_name) noexcept try {
  int changed = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::getline(std::ifstream(task.path() / "comm"), name);
    const auto thread = static_cast<pid_t>(std::stol(task.path().filename().string()));
    if (name == thread_name && make_batch(thread)) ++changed;
  }
  return changed;
} catch (const std::exception&) {
  return 0;  // no /proc, or a thread that ended meanwhile: only speed is lost
}

}  // namespace dualpipe
