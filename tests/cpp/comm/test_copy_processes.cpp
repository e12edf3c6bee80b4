#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <thread>

#include "comm/copy_pair.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

constexpr std::size_t kBytes = 3 << 20;
constexpr int kRounds = 20;

// Rank 1, in a process of its own: receives messages and sends each of them back, then pauses.
[[noreturn]] void echo(int from_parent, int to_parent) {
  std::vector<Invitation> invitations(2);
  const auto wanted = static_cast<ssize_t>(invitations.size() * sizeof(Invitation));
  if (read(from_parent, invitations.data(), static_cast<std::size_t>(wanted)) != wanted) _exit(1);
  FakeCopyWorld world;
  const auto link = copy_link(world.calls(), std::make_shared<FakeDevice>(), Rank(1));
  link->connect(ways_of(Rank(1)), invitations, 20s);
  const Piece piece{static_cast<std::byte*>(link->allocator()->allocate(kBytes)), kBytes};
  EventPtr sent;
  for (int round = 0; round < kRounds; ++round) {
    sent = link->transfer(kDown, {piece}, link->transfer(kUp, {piece}, sent));
  }
  sent->synchronize();
  (void)link->transfer(kUp, {piece}, sent);  // a posting answered after this process is dead
  (void)!write(to_parent, "d", 1);
  while (true) pause();
}

struct Child {
  Child() {
    int down[2];
    int up[2];
    EXPECT_EQ(pipe(down) | pipe(up), 0);
    process = fork();
    if (process == 0) echo(down[0], up[1]);
    to = down[1];
    from = up[0];
    (void)close(down[0]);
    (void)close(up[1]);
  }
  ~Child() {
    (void)kill(process, SIGKILL);
    (void)waitpid(process, nullptr, 0);
    (void)close(to);
    (void)close(from);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t process;
  int to;
  int from;
};

TEST(CopyProcesses, CarryAndFindOutThatOneWasKilled) {
  Child child;  // first: a process that has threads cannot be forked under ThreadSanitizer
  FakeCopyWorld world;
  auto link = copy_link(world.calls(), std::make_shared<FakeDevice>(), Rank(0));
  const std::vector<Invitation> invitations = {link->invite(), link->invite()};
  const auto length = static_cast<ssize_t>(invitations.size() * sizeof(Invitation));
  ASSERT_EQ(write(child.to, invitations.data(), static_cast<std::size_t>(length)), length);
  link->connect(ways_of(Rank(0)), invitations, 20s);

  std::vector<std::byte> bytes(kBytes);
  const Piece back{static_cast<std::byte*>(link->allocator()->allocate(kBytes)), kBytes};
  for (int round = 0; round < kRounds; ++round) {
    std::fill(bytes.begin(), bytes.end(), static_cast<std::byte>(round));
    const EventPtr returned = link->transfer(kDown, {back}, nullptr);
    link->transfer(kUp, {{bytes.data(), kBytes}}, nullptr)->synchronize();
    returned->synchronize();
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), back.data)) << "round " << round;
  }
  char done = 0;
  ASSERT_EQ(read(child.from, &done, 1), 1);
  EXPECT_EQ(link->error(kDown, true), std::nullopt);

  (void)kill(child.process, SIGKILL);
  EventPtr never = link->transfer(kDown, {back}, nullptr);
  std::optional<std::string> error;
  for (int i = 0; i < 5000 && !error; ++i) {
    error = link->error(kDown, true);
    std::this_thread::sleep_for(1ms);
  }
  EXPECT_EQ(error.value_or("none"),
            "rank 0: gradients from rank 1 to rank 0: rank 1 is gone: its process has ended");
  (void)link->transfer(kUp, {{bytes.data(), kBytes}}, nullptr);
  link->abort();
  link->drain();
  EXPECT_TRUE(never->done());
  never.reset();  // events keep the mailbox that they may wait for
  link.reset();
  EXPECT_EQ(world.num_blocks() + world.num_open() + world.num_registered(), 0);
}

}  // namespace
}  // namespace dualpipe
