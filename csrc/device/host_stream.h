#pragma once

#include <functional>
#include <memory>

namespace dualpipe {

// The host's counterpart of a CUDA stream: one worker thread that runs tasks in order. A task that
// throws stops the stream: later tasks are dropped until synchronize() has rethrown the error.
// Thread-safe. The destructor drops tasks that have not begun, waits for the running one and never
// throws; in a forked child, which lacks the worker, it leaks.
class HostStream {
 public:
  explicit HostStream(const char* name);  // at most 15 characters, shown by debuggers
  ~HostStream();
  HostStream(const HostStream&) = delete;
  HostStream& operator=(const HostStream&) = delete;

  void enqueue(std::function<void()> task);

  // Blocks until all tasks so far are done; rethrows the first error since the last call.
  void synchronize();

  // Throws what synchronize() will rethrow, if a task has already thrown. The stream stays stopped.
  void throw_if_failed() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dualpipe
