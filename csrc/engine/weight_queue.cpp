#include "engine/weight_queue.h"

#include <algorithm>

#include "common/error.h"

namespace dualpipe {

void PendingWeights::add(const WeightTargets& targets) {
  for (const void* target : targets) ++num_tasks_[target];
}

void PendingWeights::remove(const WeightTargets& targets) {
  for (const void* target : targets) {
    if (--num_tasks_[target] == 0) num_tasks_.erase(target);
  }
}

void WeightQueue::begin_backward(Stage stage, Microbatch microbatch, bool defer) {
  current_ = {stage, microbatch};
  deferring_ = defer;
}

void WeightQueue::end_backward() { deferring_ = false; }

void WeightQueue::put(Task task, WeightTargets targets) {
  DUALPIPE_CHECK(deferring_,
                 "a weight gradient was deferred outside of a backward pass for inputs");
  const std::lock_guard lock(putting_);
  tasks_[current_].push_back({std::move(task), std::move(targets)});
}

void WeightQueue::run(Stage stage, Microbatch microbatch, const WeightsAdvanced& advanced) {
  auto node = tasks_.extract({stage, microbatch});
  if (node.empty()) return;
  std::vector<Deferred>& all = node.mapped();
  const bool tells = advanced && std::none_of(all.begin(), all.end(), [](const Deferred& deferred) {
                       return deferred.targets.empty();
                     });
  PendingWeights pending;
  for (const Deferred& deferred : all) pending.add(deferred.targets);
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i].task();
    all[i].task = nullptr;  // release its tensors now
    pending.remove(all[i].targets);
    if (tells && i + 1 < all.size()) advanced(pending);
  }
}

void WeightQueue::clear() {
  tasks_.clear();
  deferring_ = false;
}

std::size_t WeightQueue::num_pending() const {
  std::size_t count = 0;
  for (const auto& [key, tasks] : tasks_) count += tasks.size();
  return count;
}

}  // namespace dualpipe
