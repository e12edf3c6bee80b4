#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <thread>

#include "comm/harness.h"
#include "comm/limited_store.h"
#include "comm/loopback.h"
#include "comm/memory_link.h"
#include "comm/store_control_plane.h"
#include "comm/watchdog.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

class FixedProgress final : public Progress {
 public:
  FixedProgress(std::string position, std::chrono::nanoseconds waiting)
      : position_(std::move(position)), waiting_(waiting) {}
  std::chrono::nanoseconds waiting() const override { return waiting_.load(); }
  std::string position() const override { return position_; }

 private:
  const std::string position_;
  std::atomic<std::chrono::nanoseconds> waiting_;
};

// A control plane that has lost its connection.
class BrokenControlPlane final : public ControlPlane {
 public:
  void report(const Failure&) override { fail(); }
  std::optional<Failure> poll() override { fail(); }
  void publish_position(const std::string&) override { fail(); }
  std::vector<std::string> positions() override { fail(); }
  void advance_epoch() override {}

 private:
  [[noreturn]] static void fail() { throw PipelineError("the store is gone"); }
};

const Watchdog::Options kFast{.poll_interval = 5ms, .timeout = 100ms};

struct Ranks {
  explicit Ranks(int num_ranks) : hub(LoopbackHub::create(num_ranks)) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      transports.push_back(hub->transport(Rank(rank)));
      controls.push_back(hub->control_plane(Rank(rank)));
    }
  }
  // The error text of a receive on this rank that nobody serves.
  std::string blocked(std::size_t rank, Rank from, const MessageId& id) {
    return text_of<PipelineError>(
        [&] { (void)transports[rank]->receive(from, id)->wait().message; });
  }
  std::shared_ptr<LoopbackHub> hub;
  std::vector<std::unique_ptr<Transport>> transports;
  std::vector<std::unique_ptr<ControlPlane>> controls;
};

TEST(Watchdog, PassesOnTheFailureOfAnotherRank) {
  Ranks ranks(2);
  Watchdog watchdog(Rank(0), *ranks.transports[0], *ranks.controls[0], {5ms, 0ms});
  ranks.transports[0]->begin_step(step_info(1));
  const FixedProgress progress("", 0ns);
  watchdog.arm(progress, 1);
  ranks.controls[1]->report({Rank(1), 1, "rank 1, action 5F2: division by zero"});
  EXPECT_EQ(ranks.blocked(0, Rank(1), gradient(2)), "rank 1, action 5F2: division by zero");
  watchdog.disarm();
}

TEST(Watchdog, SeesItsTimeLimitWithoutNewsOfTheOthers) {
  Ranks ranks(2);
  SharedStore store;
  const auto control = store_control_plane(limited_store(store.open(), 50ms), Rank(0), 2);
  store.freeze();
  {
    Watchdog watchdog(Rank(0), *ranks.transports[0], *control, kFast);
    ranks.transports[0]->begin_step(step_info(1));
    const FixedProgress progress("", 10s);
    watchdog.arm(progress, 1);
    const std::string text = ranks.blocked(0, Rank(1), gradient(2));
    EXPECT_EQ(text.find("rank 0 has waited longer than 0.1 s: "), 0u) << text;
    watchdog.disarm();
  }
  store.thaw();
}

TEST(Watchdog, AStoreThatIsSilentForAWhileEndsNoStep) {
  Ranks ranks(2);
  SharedStore store;
  const auto control = store_control_plane(limited_store(store.open(), 50ms), Rank(0), 2);
  Watchdog watchdog(Rank(0), *ranks.transports[0], *control, kFast);
  ranks.transports[0]->begin_step(step_info(1));
  const FixedProgress progress("computes", 0ns);
  watchdog.arm(progress, 1);
  store.freeze();
  std::this_thread::sleep_for(300ms);  // it has to publish its position every 25 ms
  EXPECT_NO_THROW(ranks.transports[0]->send(Rank(1), activation(0), make_message({}, 0), nullptr));
  watchdog.disarm();
  store.thaw();
}

TEST(Watchdog, AFailureOfALaterStepDoesNotEndThisOne) {
  Ranks ranks(2);
  Watchdog watchdog(Rank(0), *ranks.transports[0], *ranks.controls[0], {1ms, 0ms});
  ranks.transports[0]->begin_step(step_info(1));
  ranks.transports[1]->begin_step(step_info(1));
  const FixedProgress progress("", 0ns);
  watchdog.arm(progress, 1);
  ranks.controls[1]->report({Rank(1), 2, "in the next step"});
  std::this_thread::sleep_for(30ms);
  EXPECT_NO_THROW(ranks.transports[0]->send(Rank(1), activation(0), make_message({}, 0), nullptr));
  watchdog.disarm();
  watchdog.arm(progress, 2);
  EXPECT_EQ(ranks.blocked(0, Rank(1), gradient(2)), "in the next step");
  watchdog.disarm();
}

TEST(Watchdog, ALostMessageEndsInATimeoutThatNamesEverybody) {
  Ranks ranks(2);
  std::vector<std::string> texts(2);
  run_ranks(2, [&](int rank) {
    const auto index = static_cast<std::size_t>(rank);
    Watchdog watchdog(Rank(rank), *ranks.transports[index], *ranks.controls[index], kFast);
    ranks.transports[index]->begin_step(step_info());
    const MessageId id = rank == 0 ? gradient(4) : activation(4);
    const FixedProgress progress(cat("waits for the ", to_string(id), " from rank ", 1 - rank),
                                 200ms);
    watchdog.arm(progress, 1);
    texts[index] = ranks.blocked(index, Rank(1 - rank), id);
    watchdog.disarm();
  });
  EXPECT_EQ(texts[0], texts[1]);
  for (const char* part :
       {"has waited longer than 0.1 s",
        "rank 0: waits for the gradient of micro-batch 4 for stage 0 from rank 1",
        "rank 1: waits for the activation of micro-batch 4 for stage 1 from rank 0"}) {
    EXPECT_NE(texts[0].find(part), std::string::npos) << texts[0];
  }
}

TEST(Watchdog, ADroppedMessageIsNamedWithItsChannel) {
  Ranks ranks(2);
  ranks.hub->inject([](Rank, Rank, const MessageId& id) {
    return id.microbatch == Microbatch(4) ? Fault::kDrop : Fault::kNone;
  });
  for (auto& transport : ranks.transports) transport->begin_step(step_info());
  ranks.transports[0]->send(Rank(1), activation(4), make_message({bytes_spec(8)}, 0), nullptr);
  ranks.controls[0]->publish_position("action 9 of 9: done, waits for the other ranks");
  Watchdog watchdog(Rank(1), *ranks.transports[1], *ranks.controls[1], kFast);
  const FixedProgress progress(
      cat("action 3 of 9: 1F4, waits for the ", to_string(activation(4)), " from rank 0"), 200ms);
  watchdog.arm(progress, 1);
  const std::string text = ranks.blocked(1, Rank(0), activation(4));
  watchdog.disarm();
  for (const char* part :
       {"rank 1 has waited longer than 0.1 s: action 3 of 9: 1F4, waits for the activation of "
        "micro-batch 4 for stage 1 from rank 0",
        "rank 0: action 9 of 9: done"}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
  EXPECT_EQ(ranks.controls[0]->poll()->text, text);
}

TEST(Watchdog, AFailureOfALaterStepDoesNotSilenceATimeout) {
  Ranks ranks(2);
  Watchdog watchdog(Rank(0), *ranks.transports[0], *ranks.controls[0], kFast);
  ranks.transports[0]->begin_step(step_info(1));
  ranks.controls[1]->report({Rank(1), 2, "in the next step"});
  const FixedProgress progress("waits for what was lost", 200ms);
  watchdog.arm(progress, 1);
  const std::string text = ranks.blocked(0, Rank(1), gradient(2));
  watchdog.disarm();
  EXPECT_NE(text.find("rank 0 has waited longer than 0.1 s: waits for what was lost"),
            std::string::npos)
      << text;
}

TEST(Watchdog, PatienceWhileTheRankComputes) {
  Ranks ranks(1);
  Watchdog watchdog(Rank(0), *ranks.transports[0], *ranks.controls[0], {1ms, 5ms});
  ranks.transports[0]->begin_step(step_info());
  const FixedProgress progress("computes", 0ns);
  watchdog.arm(progress, 1);
  std::this_thread::sleep_for(50ms);
  EXPECT_NO_THROW(ranks.transports[0]->end_step());
  EXPECT_EQ(ranks.controls[0]->positions().front(), "computes");
  watchdog.disarm();
}

TEST(Watchdog, ABrokenControlPlaneEndsTheStep) {
  Ranks ranks(2);
  BrokenControlPlane control;
  Watchdog watchdog(Rank(0), *ranks.transports[0], control, {5ms, 0ms});
  ranks.transports[0]->begin_step(step_info());
  const FixedProgress progress("", 0ns);
  watchdog.arm(progress, 1);
  const std::string text = ranks.blocked(0, Rank(1), gradient(0));
  EXPECT_NE(text.find("cannot reach the other ranks any more: the store is gone"),
            std::string::npos)
      << text;
  watchdog.disarm();
}

TEST(Watchdog, AForkedChildDoesNotWaitForAThreadThatItLacks) {
  Ranks ranks(1);
  std::optional<Watchdog> watchdog;
  watchdog.emplace(Rank(0), *ranks.transports[0], *ranks.controls[0], kFast);
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);  // ends the child should it hang
    watchdog.reset();
    _exit(0);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(Watchdog, ProgressIsNotUsedAfterDisarm) {
  Ranks ranks(1);
  Watchdog watchdog(Rank(0), *ranks.transports[0], *ranks.controls[0], {1ms, 4ms});
  for (int step = 1; step <= 200; ++step) {
    auto progress = std::make_unique<FixedProgress>("somewhere", 0ns);
    watchdog.arm(*progress, step);
    if (step % 20 == 0) std::this_thread::sleep_for(3ms);
    watchdog.disarm();
  }
}

}  // namespace
}  // namespace dualpipe
