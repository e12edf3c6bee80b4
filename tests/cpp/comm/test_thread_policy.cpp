#include <gtest/gtest.h>
#include <pthread.h>
#include <sched.h>

#include <future>
#include <thread>

#include "comm/thread_policy.h"

namespace dualpipe {
namespace {

// A named thread that reports its policy when it ends.
class Named {
 public:
  explicit Named(const char* name, int policy = SCHED_OTHER) {
    std::promise<void> named;
    auto is_named = named.get_future();
    thread_ = std::thread([this, name, policy, named = std::move(named)]() mutable {
      pthread_setname_np(pthread_self(), name);
      const sched_param no_priority{};
      sched_setscheduler(0, policy, &no_priority);
      named.set_value();
      finish_.get_future().wait();
      policy_ = sched_getscheduler(0);
    });
    is_named.wait();
  }
  int finish() {
    finish_.set_value();
    thread_.join();
    return policy_;
  }

 private:
  std::promise<void> finish_;
  int policy_ = -1;
  std::thread thread_;
};

TEST(ThreadPolicy, ConcernsAllThreadsOfTheName) {
  Named first("a_loop");
  Named second("a_loop");
  Named other("a_loop_too");
  EXPECT_EQ(never_preempt("a_loop"), 2);
  EXPECT_EQ(first.finish(), SCHED_BATCH);
  EXPECT_EQ(second.finish(), SCHED_BATCH);
  EXPECT_EQ(other.finish(), SCHED_OTHER);
}

TEST(ThreadPolicy, IsLeftAloneWhereItWasChosen) {
  Named idle("a_loop", SCHED_IDLE);
  Named batch("a_loop", SCHED_BATCH);
  EXPECT_EQ(never_preempt("a_loop"), 1);
  EXPECT_EQ(idle.finish(), SCHED_IDLE);
  EXPECT_EQ(batch.finish(), SCHED_BATCH);
}

TEST(ThreadPolicy, NoSuchThreadIsFine) { EXPECT_EQ(never_preempt("no_such_loop"), 0); }

}  // namespace
}  // namespace dualpipe
