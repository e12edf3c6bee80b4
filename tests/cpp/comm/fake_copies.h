#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "comm/copy_calls.h"

namespace dualpipe::testing {

// Copy engines among threads and processes, on FakeStreams. Device memory is full of 0xEE when it
// is allocated, may be opened by other processes, and is gone from the address space once it is
// freed, so that a copy that comes late is fatal. Faults are those that real calls have.
class FakeCopyWorld {
 public:
  FakeCopyWorld();

  [[nodiscard]] std::shared_ptr<CopyCalls> calls();

  // The next call of this name, by any rank, throws; after: that many calls succeed first.
  void fail(const std::string& call, int after = 0);
  // All copies and flags from now on: as on a device that has met a fatal error.
  void break_device();
  void mend_device();

  // All calls of all threads wait as long as it is held, as they do beside one that waits for the
  // device with the driver's lock.
  [[nodiscard]] std::unique_lock<std::mutex> hold_calls();
  [[nodiscard]] int num_calls() const;  // begun, those that wait included

  [[nodiscard]] int num_blocks() const;      // allocated and not freed
  [[nodiscard]] int num_open() const;        // blocks opened and not closed
  [[nodiscard]] int num_registered() const;  // pieces of host memory
  [[nodiscard]] int num_copies() const;      // calls

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace dualpipe::testing
