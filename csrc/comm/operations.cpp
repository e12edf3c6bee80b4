#include "comm/operations.h"

#include <utility>

namespace dualpipe {
namespace {

struct Graveyard {
  std::mutex mutex;
  std::list<Operations::Entry> entries;
};

Graveyard& graveyard() {
  static auto* const kept = new Graveyard;  // never destroyed: links use it during process exit
  return *kept;
}

}  // namespace

Operations::~Operations() {
  bury();
  if (buried_.empty()) return;
  Graveyard& kept = graveyard();
  const std::lock_guard lock(kept.mutex);
  kept.entries.splice(kept.entries.end(), buried_);
}

Operations::Handle Operations::add(Entry entry) {
  const std::lock_guard lock(mutex_);
  entries_.push_back(std::move(entry));
  // abort_all() runs after the flag is set: either it sees this entry, or the entry sees the flag.
  if (failure_.is_set()) entries_.back().operation->abort();
  return std::prev(entries_.end());
}

std::shared_ptr<Buffer> Operations::finish(Handle handle) {
  std::list<Entry> done;  // destroyed after the lock is released
  const std::lock_guard lock(mutex_);
  done.splice(done.begin(), entries_, handle);
  return std::move(done.front().buffer);
}

void Operations::abort_all() noexcept {
  const std::lock_guard lock(mutex_);
  for (Entry& entry : entries_) entry.operation->abort();
}

void Operations::bury() {
  const std::lock_guard lock(mutex_);
  buried_.splice(buried_.end(), entries_);
}

}  // namespace dualpipe
