#include "engine/weight_queue.h"

#include "common/error.h"

namespace dualpipe {

void WeightQueue::begin_backward(Stage stage, Microbatch microbatch, bool defer) {
  current_ = {stage, microbatch};
  deferring_ = defer;
}

void WeightQueue::end_backward() { deferring_ = false; }

void WeightQueue::put(Task task) {
  DUALPIPE_CHECK(deferring_,
                 "a weight gradient was deferred outside of a backward pass for inputs");
  tasks_[current_].push_back(std::move(task));
}

void WeightQueue::run(Stage stage, Microbatch microbatch) {
  auto node = tasks_.extract({stage, microbatch});
  if (node.empty()) return;
  for (Task& task : node.mapped()) {
    task();
    task = nullptr;  // its tensors are not needed any more
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
