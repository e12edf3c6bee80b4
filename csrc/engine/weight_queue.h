#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "common/ids.h"

namespace dualpipe {

// What a task adds to, named by any address of it. Empty: nobody knows, or it is added later.
using WeightTargets = std::vector<const void*>;

// What the tasks of a W that have yet to run will add to.
class PendingWeights {
 public:
  void add(const WeightTargets& targets);
  void remove(const WeightTargets& targets);
  [[nodiscard]] bool contains(const void* target) const { return num_tasks_.contains(target); }

 private:
  std::map<const void*, int> num_tasks_;
};
// Called between the tasks of a W if the targets of all are known. Empty: nobody wants to know.
using WeightsAdvanced = std::function<void(const PendingWeights&)>;

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
  void put(Task task, WeightTargets targets = {});

  // Runs the tasks of one W and forgets them. No tasks is fine: nothing could be deferred.
  void run(Stage stage, Microbatch microbatch, const WeightsAdvanced& advanced = {});

  // Forgets everything: after a step that threw.
  void clear();
  [[nodiscard]] std::size_t num_pending() const;
  // Pairs of stage and micro-batch that have some.
  [[nodiscard]] std::size_t num_microbatches() const { return tasks_.size(); }

 private:
  using Key = std::pair<Stage, Microbatch>;
  struct Deferred {
    Task task;
    WeightTargets targets;
  };
  std::map<Key, std::vector<Deferred>> tasks_;
  Key current_;
  bool deferring_ = false;
};

}  // namespace dualpipe
