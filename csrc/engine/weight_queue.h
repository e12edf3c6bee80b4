#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "common/ids.h"

namespace dualpipe {

// The gradients that a task adds to, each identified by some address of its own. Empty: unknown, or
// added to later.
using WeightTargets = std::vector<const void*>;

// The targets of those tasks of a W that have yet to run.
class PendingWeights {
 public:
  void add(const WeightTargets& targets);
  void remove(const WeightTargets& targets);
  [[nodiscard]] bool contains(const void* target) const { return num_tasks_.contains(target); }

 private:
  std::map<const void*, int> num_tasks_;
};
// Called between the tasks of a W if the targets of all of them are known. May be empty.
using WeightsAdvanced = std::function<void(const PendingWeights&)>;

// Deferred weight gradients of one engine, first in, first out within a (stage, micro-batch).
// Autograd may call put() from its own threads, one for each device of a stage, while the engine's
// thread waits for it; otherwise one thread at a time.
class WeightQueue {
 public:
  using Task = std::function<void()>;

  // Begins a backward pass that may defer its weight gradients (I) or must finish them (B).
  void begin_backward(Stage stage, Microbatch microbatch, bool defer);
  void end_backward();
  [[nodiscard]] bool deferring() const { return deferring_; }

  // Defers a task to the W of the current backward pass. Only while deferring().
  void put(Task task, WeightTargets targets = {});

  // Runs the tasks of one W and forgets them. There may be none, if nothing could be deferred.
  void run(Stage stage, Microbatch microbatch, const WeightsAdvanced& advanced = {});

  // Forgets everything. For use after a step that threw.
  void clear();
  [[nodiscard]] std::size_t num_pending() const;
  // The number of (stage, micro-batch) pairs with pending tasks.
  [[nodiscard]] std::size_t num_microbatches() const { return tasks_.size(); }

 private:
  using Key = std::pair<Stage, Microbatch>;
  struct Deferred {
    Task task;
    WeightTargets targets;
  };
  std::mutex putting_;
  std::map<Key, std::vector<Deferred>> tasks_;
  Key current_;
  bool deferring_ = false;
};

}  // namespace dualpipe
