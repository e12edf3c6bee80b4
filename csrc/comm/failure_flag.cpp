#include "comm/failure_flag.h"

#include <utility>

#include "common/error.h"

namespace dualpipe {

bool FailureFlag::set(Kind kind, std::string text) {
  const std::lock_guard lock(mutex_);
  if (is_set()) return false;
  kind_ = kind;
  text_ = std::move(text);
  set_.store(true, std::memory_order_release);
  return true;
}

void FailureFlag::clear() {
  const std::lock_guard lock(mutex_);
  set_.store(false, std::memory_order_release);
}

void FailureFlag::raise() const {
  const std::lock_guard lock(mutex_);
  if (!is_set()) return;  // cleared in between
  if (kind_ == Kind::kUser) throw UserError(text_);
  throw PipelineError(text_);
}

}  // namespace dualpipe
