#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "common/ids.h"

namespace dualpipe {

// Deferred weight gradients of one engine, first in, first out within a (stage, micro-batch).
// Autograd may put from its own threads while the engine's thread waits for it; otherwise one
// thread at a time.
class WeightQueue {
 public:
  using Task = std::function<void()>;

  // Whether the backward pass at work may defer (I) or must finish its weight gradients (B).
  void begin_backward(Stage stage, Microbatch microbatch, bool defer);
  void end_backward();
  [[nodiscard]] bool deferring() const { return deferring_; }

  // Defers a task to the W of the backward pass at work. Only while deferring().
  void put(Task task);

  // Runs the tasks of one W and forgets them. No tasks is fine: nothing could be deferred.
  void run(Stage stage, Microbatch microbatch);

  // Forgets everything: after a step that threw.
  void clear();
  [[nodiscard]] std::size_t num_pending() const;

 private:
  using Key = std::pair<Stage, Microbatch>;
  std::map<Key, std::vector<Task>> tasks_;
  Key current_;
  bool deferring_ = false;
};

}  // namespace dualpipe
