#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <latch>
#include <thread>

#include "comm/copy_mailbox.h"
#include "comm/copy_pair.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

TEST(CopyLink, CarriesInOrderPastTheWrapOfItsCounters) {
  static_assert(CopyMailbox::kFirstMessage > 0xFFFFFF00);
  CopyPair pair;
  pair.connect();
  std::vector<CopyPair::Received> received;
  for (int i = 0; i < 300; ++i) {
    (void)pair.send(i, {100, 3});
    received.push_back(pair.receive({100, 3}));
  }
  for (int i = 0; i < 300; ++i) {
    EXPECT_TRUE(received[static_cast<std::size_t>(i)].is(i)) << "message " << i;
  }
}

TEST(CopyLink, CopiesWhenBothSidesAreReady) {
  CopyPair pair;
  pair.connect();
  std::latch written(1);
  std::latch read(1);
  pair.devices[0]->compute().launch([&] { written.wait(); });
  pair.devices[1]->compute().launch([&] { read.wait(); });
  const EventPtr left = pair.send(1, {64}, pair.devices[0]->compute().record());
  const auto received = pair.receive({64}, pair.devices[1]->compute().record());
  std::this_thread::sleep_for(5ms);
  EXPECT_FALSE(left->done());
  written.count_down();
  std::this_thread::sleep_for(5ms);
  EXPECT_FALSE(left->done());
  EXPECT_EQ(received.pieces[0].data[0], std::byte{0xEE});
  read.count_down();
  EXPECT_TRUE(received.is(1));
  left->synchronize();
  EXPECT_TRUE(left->done());
}

TEST(CopyLink, ASendAheadOfItsReceiveIsIssuedWithoutAnotherCall) {
  CopyPair pair;
  pair.connect();
  const EventPtr left = pair.send(7, {1000});
  FakeStream& compute = pair.devices[0]->compute();
  left->hold_back(compute);  // before there is anything to wait for on the device
  std::byte* const bytes = pair.sent.back()->data();
  compute.launch([bytes] { bytes[999] = std::byte{0}; });
  std::this_thread::sleep_for(5ms);
  EXPECT_FALSE(left->done());
  const auto received = pair.receive({1000});
  EXPECT_TRUE(received.is(7));
  left->synchronize();
  left->hold_back(compute);
  compute.record()->synchronize();
  EXPECT_EQ(bytes[999], std::byte{0});
}

// Rank 1's memory becomes free, and rank 0's message is written, only when no call gets through any
// more: everything had been issued before.
TEST(CopyLink, NoMessageNeedsTheHostOnceBothHaveAskedForIt) {
  CopyPair pair;
  pair.connect();
  std::latch written(1);
  std::latch read(1);
  pair.devices[0]->compute().launch([&] { written.wait(); });
  pair.devices[1]->compute().launch([&] { read.wait(); });
  (void)pair.send(1, {64}, pair.devices[0]->compute().record());
  (void)pair.send(2, {64});
  EXPECT_FALSE(pair.links[0]->progress());
  const EventPtr free = pair.devices[1]->compute().record();
  const auto first = pair.receive({64}, free);
  const auto second = pair.receive({64}, free);
  EXPECT_TRUE(pair.links[1]->progress());
  EXPECT_TRUE(pair.links[0]->progress());
  const auto held = pair.world.hold_calls();
  read.count_down();
  written.count_down();
  EXPECT_TRUE(first.is(1));
  EXPECT_TRUE(second.is(2));
}

// Rank 0's computation waits for a message that rank 1 sends only after it has asked for one that
// waits for this computation; all their streams are in one queue.
TEST(CopyLink, InASharedQueueNoMessageKeepsBackTheOneThatItWaitsFor) {
  CopyPair pair(Queues::kShared);
  pair.connect();
  FakeStream& compute = pair.devices[0]->compute();
  auto* const place = static_cast<std::byte*>(pair.links[0]->allocator()->allocate(8));
  const EventPtr arrived = pair.links[0]->transfer(kDown, {{place, 8}}, nullptr);
  arrived->hold_back(compute);
  (void)pair.send(3, {64}, compute.record());
  const auto received = pair.receive({64});
  std::vector<std::byte> answer(8, std::byte{9});
  std::this_thread::sleep_for(5ms);
  const EventPtr left = pair.links[1]->transfer(kDown, {{answer.data(), 8}}, nullptr);
  EXPECT_TRUE(received.is(3));
  EXPECT_EQ(place[7], std::byte{9});
  left->synchronize();
}

TEST(CopyLink, InASharedQueueMemoryIsWrittenOnceItIsFree) {
  CopyPair pair(Queues::kShared);
  pair.connect();
  std::latch read(1);
  pair.devices[1]->compute().launch([&] { read.wait(); });
  const EventPtr left = pair.send(1, {64});
  const auto received = pair.receive({64}, pair.devices[1]->compute().record());
  std::this_thread::sleep_for(5ms);
  EXPECT_FALSE(left->done());
  EXPECT_EQ(received.pieces[0].data[0], std::byte{0xEE});
  read.count_down();
  EXPECT_TRUE(received.is(1));
}

TEST(CopyLink, MorePostingsThanTheMailboxHolds) {
  constexpr int kMessages = 2 * CopyMailbox::kCapacity + 10;
  CopyPair pair;
  pair.connect();
  std::vector<CopyPair::Received> received;
  for (int i = 0; i < kMessages; ++i) received.push_back(pair.receive({8}));
  for (int i = 0; i < kMessages; ++i) (void)pair.send(i, {8});
  for (int i = 0; i < kMessages; ++i) {
    ASSERT_TRUE(received[static_cast<std::size_t>(i)].is(i)) << "message " << i;
  }
}

TEST(CopyLink, AMessageOfMorePiecesThanTheMailboxHolds) {
  const std::vector<std::size_t> sizes(2 * CopyMailbox::kCapacity + 10, 4);
  CopyPair pair;
  pair.connect();
  (void)pair.send(5, sizes);
  EXPECT_TRUE(pair.receive(sizes).is(5));
}

TEST(CopyLink, SmallMemoryComesFromFewBlocksAndLargeOnesAreAlone) {
  CopyPair pair;
  pair.connect();
  const int before = pair.world.num_blocks();
  std::vector<CopyPair::Received> received;
  for (int i = 0; i < 100; ++i) received.push_back(pair.receive({1000}));
  EXPECT_EQ(pair.world.num_blocks(), before);
  received.push_back(pair.receive({std::size_t{5} << 20}));
  EXPECT_EQ(pair.world.num_blocks(), before + 1);
  for (int i = 0; i < 100; ++i) (void)pair.send(i, {1000});
  (void)pair.send(100, {std::size_t{5} << 20});
  for (int i = 0; i <= 100; ++i) EXPECT_TRUE(received[static_cast<std::size_t>(i)].is(i));
}

TEST(CopyLink, LeavesNothingBehind) {
  CopyPair pair;
  pair.connect();
  (void)pair.send(1, {100});
  EXPECT_TRUE(pair.receive({100}).is(1));
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    const std::string name = entry.path().filename().string();
    EXPECT_EQ(name.find(cat("dualpipe-", getpid(), "-")), std::string::npos) << name;
  }
  EXPECT_EQ(pair.world.num_registered(), 2);  // a way's page, once for both of its ranks
  pair.links.clear();
  EXPECT_EQ(pair.world.num_blocks(), 0);
  EXPECT_EQ(pair.world.num_open(), 0);
  EXPECT_EQ(pair.world.num_registered(), 0);
}

}  // namespace
}  // namespace dualpipe
