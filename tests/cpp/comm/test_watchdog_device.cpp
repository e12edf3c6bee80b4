#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#include "comm/harness.h"
#include "comm/loopback.h"
#include "comm/watchdog.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

class NoProgress final : public Progress {
 public:
  std::chrono::nanoseconds waiting() const override { return 0ns; }
  std::string position() const override { return "a position"; }
};

// A transport whose device is still working after the step, and may fail meanwhile.
class BusyTransport final : public Transport {
 public:
  void begin_step(const StepInfo&) override {}
  EventPtr send(Rank, const MessageId&, Message, const EventPtr&) override { return nullptr; }
  std::unique_ptr<PendingReceive> receive(Rank, const MessageId&) override { return nullptr; }
  void end_step() override {}
  void recover() override {}
  void abort(const Failure& failure) noexcept override {
    const std::lock_guard lock(mutex);
    if (text.empty()) text = failure.text;
  }
  bool busy() override {
    if (is_broken) throw std::runtime_error("a device assert");
    return !aborted();
  }
  std::optional<std::string> fault() override {
    return is_lost ? std::optional<std::string>("the peer is gone") : std::nullopt;
  }

  [[nodiscard]] bool aborted() const {
    const std::lock_guard lock(mutex);
    return !text.empty();
  }
  [[nodiscard]] std::string wait_for_abort() const {
    for (int i = 0; i < 2000 && !aborted(); ++i) std::this_thread::sleep_for(1ms);
    const std::lock_guard lock(mutex);
    return text;
  }

  std::atomic<bool> is_broken{false};
  std::atomic<bool> is_lost{false};
  mutable std::mutex mutex;
  std::string text;
};

struct AfterAStep : ::testing::Test {
  AfterAStep() : watchdog(Rank(0), transport, *control, {.poll_interval = 2ms}) {
    const NoProgress progress;
    watchdog.arm(progress, 1);
    watchdog.disarm();
  }
  std::shared_ptr<LoopbackHub> hub = LoopbackHub::create(2);
  std::unique_ptr<ControlPlane> control = hub->control_plane(Rank(0));
  BusyTransport transport;
  Watchdog watchdog;
};

TEST_F(AfterAStep, ADeviceThatWorksOnIsLeftAlone) {
  std::this_thread::sleep_for(100ms);
  EXPECT_FALSE(transport.aborted());
}

TEST_F(AfterAStep, AFaultOfTheDeviceIsReportedAndEndsIt) {
  transport.is_lost = true;
  EXPECT_EQ(transport.wait_for_abort(), "the peer is gone");
  const auto failure = hub->control_plane(Rank(1))->poll();
  ASSERT_TRUE(failure.has_value());
  EXPECT_EQ(failure->text, "the peer is gone");
}

TEST_F(AfterAStep, AnotherRanksFailureEndsIt) {
  hub->control_plane(Rank(1))->report({Rank(1), 1, "rank 1 ran out of memory"});
  EXPECT_EQ(transport.wait_for_abort(), "rank 1 ran out of memory");
}

TEST_F(AfterAStep, ADeviceThatCannotBeAskedAnyMoreEndsIt) {
  transport.is_broken = true;
  EXPECT_EQ(transport.wait_for_abort(), "rank 0 cannot go on: a device assert");
}

TEST(Watchdog, EndsAStepThatIsToStop) {
  const auto hub = LoopbackHub::create(2);
  const auto control = hub->control_plane(Rank(0));
  BusyTransport transport;
  std::atomic<bool> interrupted{false};
  Watchdog watchdog(Rank(0), transport, *control,
                    {.poll_interval = 2ms, .interrupted = [&] { return interrupted.load(); }});
  const NoProgress progress;
  watchdog.arm(progress, 1);
  interrupted = true;
  EXPECT_EQ(transport.wait_for_abort(), "rank 0 was interrupted (Ctrl-C)");
  watchdog.disarm();
}

}  // namespace
}  // namespace dualpipe
