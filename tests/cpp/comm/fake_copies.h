#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "comm/copy_calls.h"

namespace dualpipe::testing {

// Fake copy engines between threads and processes, on FakeStreams. Device memory is filled with
// 0xEE when it is allocated, may be opened by other processes, and is unmapped when it is freed, so
// that a late copy is fatal. Faults are those that real calls have.
class FakeCopyWorld {
 public:
  FakeCopyWorld();

  [[nodiscard]] std::shared_ptr<CopyCalls> calls();

  // The next call of this name, by any rank, throws; after: that many calls succeed first.
  void fail(const std::string& call, int after = 0);
  // Every call that can fail does so from now on, as on a device after a fatal error.
  void break_device();
  void mend_device();

  // While this lock is held, all calls of all threads block, as they do beside one that waits for
  // the device with the driver's lock.
  [[nodiscard]] std::unique_lock<std::mutex> hold_calls();
  [[nodiscard]] bool is_blocked(std::thread::id thread) const;  // in such a call

  [[nodiscard]] int num_blocks() const;      // allocated and not freed
  [[nodiscard]] int num_open() const;        // blocks opened and not closed
  [[nodiscard]] int num_registered() const;  // pieces of host memory
  [[nodiscard]] int num_copies() const;      // calls

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace dualpipe::testing
