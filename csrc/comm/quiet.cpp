#include "comm/quiet.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

namespace dualpipe {
namespace {

constexpr std::chrono::seconds kPatience{10};

class Quiet {
 public:
  void begin_step() {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kPatience, [this] { return !is_ending_; });
    ++num_steps_;
  }

  void end_step() {
    std::unique_lock lock(mutex_);
    --num_steps_;
    end_connections(lock);
  }

  void add(std::shared_ptr<void> connection) {
    std::unique_lock lock(mutex_);
    connections_.push_back(std::move(connection));
    end_connections(lock);
  }

 private:
  // Releasing one connection may add another.
  void end_connections(std::unique_lock<std::mutex>& lock) {
    if (num_steps_ > 0 || std::exchange(is_ending_, true)) return;
    while (!connections_.empty()) {
      std::vector<std::shared_ptr<void>> ending = std::exchange(connections_, {});
      lock.unlock();
      ending.clear();
      lock.lock();
    }
    is_ending_ = false;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<void>> connections_;
  int num_steps_ = 0;
  bool is_ending_ = false;
};

// Never destroyed: connections left at the end of the process end with it.
Quiet& quiet() {
  static auto* const made = new Quiet;
  return *made;
}

}  // namespace

StepUnderWay::StepUnderWay() { quiet().begin_step(); }
StepUnderWay::~StepUnderWay() { quiet().end_step(); }

void let_go_between_steps(std::shared_ptr<void> connection) { quiet().add(std::move(connection)); }

}  // namespace dualpipe
