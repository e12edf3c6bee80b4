#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "comm/nccl_calls.h"

namespace dualpipe::testing {

// Fake NCCL between threads, on FakeStreams: communicators of two that block until both sides have
// joined, messages that wait for each other in the order of their streams, groups that do nothing
// before they are closed. All calls() of one world can connect to each other. Faults are those that
// real ones report.
class FakeNcclWorld {
 public:
  FakeNcclWorld();
  ~FakeNcclWorld();

  [[nodiscard]] std::shared_ptr<NcclCalls> calls();

  // The next call of this name, by any rank, returns `result` and does nothing; after: that many
  // calls succeed first.
  void fail(const std::string& call, NcclResult result, int after = 0);
  // From now on the communicators of all ranks report this.
  void break_network();
  void mend_network();

  // From now on a thread that issues a message waits for it to run, as it does where the device's
  // queue is full.
  void fill_queues();
  [[nodiscard]] bool is_blocked(std::thread::id thread) const;  // there

  void wait_until_groups_are_closed() const;
  [[nodiscard]] int num_communicators() const;  // made and not aborted
  [[nodiscard]] int num_messages() const;       // issued: sends and receives

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace dualpipe::testing
