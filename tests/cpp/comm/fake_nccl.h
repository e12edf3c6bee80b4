#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "comm/nccl_calls.h"

namespace dualpipe::testing {

// NCCL among threads, on FakeStreams: communicators of two that block until both have asked,
// messages that wait for each other in the order of their streams, groups that do nothing before
// they are closed. All that are made of one world can meet. Faults are those that real ones report.
class FakeNcclWorld {
 public:
  FakeNcclWorld();
  ~FakeNcclWorld();

  [[nodiscard]] std::shared_ptr<NcclCalls> calls();

  // The next call of this name, by any rank, answers `result` and does nothing; after: that many
  // calls succeed first.
  void fail(const std::string& call, NcclResult result, int after = 0);
  // From now on the communicators of all ranks report this.
  void break_network();
  void mend_network();

  void wait_until_groups_are_closed() const;
  [[nodiscard]] int num_communicators() const;  // made and not aborted
  [[nodiscard]] int num_messages() const;       // issued: sends and receives

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace dualpipe::testing
