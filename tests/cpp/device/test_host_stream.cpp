#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "device/device.h"
#include "device/host_stream.h"

namespace dualpipe {
namespace {

using namespace std::chrono_literals;

TEST(HostStream, RunsTasksInOrder) {
  HostStream stream("test");
  std::vector<int> order;
  for (int i = 0; i < 1000; ++i) stream.enqueue([&order, i] { order.push_back(i); });
  stream.synchronize();
  ASSERT_EQ(order.size(), 1000u);
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(order[static_cast<std::size_t>(i)], i);
}

TEST(HostStream, AnErrorDropsLaterTasksUntilItIsSeen) {
  HostStream stream("test");
  std::atomic<int> ran{0};
  stream.enqueue([] { throw std::runtime_error("first"); });
  stream.enqueue([] { throw std::runtime_error("second"); });
  stream.enqueue([&ran] { ++ran; });
  try {
    stream.synchronize();
    FAIL() << "the error was lost";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "first");
  }
  EXPECT_EQ(ran, 0);
  stream.enqueue([&ran] { ++ran; });
  EXPECT_NO_THROW(stream.synchronize());
  EXPECT_EQ(ran, 1);
}

TEST(HostStream, AnErrorIsToldBeforeTheStreamIsThrough) {
  HostStream stream("test");
  EXPECT_NO_THROW(stream.throw_if_failed());
  std::atomic<int> ran{0};
  stream.enqueue([] { throw std::runtime_error("first"); });
  stream.enqueue([&ran] { ++ran; });
  std::optional<std::string> told;
  for (const auto end = std::chrono::steady_clock::now() + 10s;
       !told && std::chrono::steady_clock::now() < end;) {
    try {
      stream.throw_if_failed();
      std::this_thread::sleep_for(1ms);
    } catch (const std::runtime_error& error) {
      told = error.what();
    }
  }
  EXPECT_EQ(told, "first");
  EXPECT_THROW(stream.synchronize(), std::runtime_error);  // still there, and nothing has run
  EXPECT_EQ(ran, 0);
}

TEST(HostStream, ATaskLetsGoOfWhatItHoldsBeforeItIsDone) {
  HostStream stream("test");
  auto held = std::make_shared<int>(1);
  const std::weak_ptr<int> watch = held;
  stream.enqueue([held = std::move(held)] {});
  stream.synchronize();
  EXPECT_TRUE(watch.expired());
}

TEST(HostStream, DestructionDropsWhatHasNotBegun) {
  std::atomic<int> ran{0};
  auto held = std::make_shared<int>(1);
  const std::weak_ptr<int> watch = held;
  {
    HostStream stream("test");
    std::atomic<bool> begun{false};
    stream.enqueue([&] {
      begun = true;
      std::this_thread::sleep_for(30ms);
      ++ran;
    });
    stream.enqueue([&ran, held = std::move(held)] { ++ran; });
    while (!begun) std::this_thread::yield();
  }
  EXPECT_EQ(ran, 1);
  EXPECT_TRUE(watch.expired());
}

TEST(HostStream, AForkedChildDoesNotWaitForAThreadThatItLacks) {
  std::optional<HostStream> stream("test");
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);  // ends the child should it hang
    stream.reset();
    _exit(0);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(HostStream, ManyThreadsEnqueue) {
  HostStream stream("test");
  int count = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) stream.enqueue([&count] { ++count; });
      stream.synchronize();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(count, 2000);
}

TEST(HostDevice, ComputationIsOverWhenTheCallReturns) {
  const auto device = host_device();
  EXPECT_EQ(device->compute().record(), nullptr);
  EXPECT_NO_THROW(device->compute().wait(nullptr));
}

}  // namespace
}  // namespace dualpipe
