#include <gtest/gtest.h>

#include <chrono>
#include <latch>
#include <thread>

#include "comm/copy_pair.h"
#include "comm/harness.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::string await_error(DeviceLink& link) {
  for (int i = 0; i < 2000; ++i) {
    for (const DeviceLink::Index way : {0, 1}) {
      if (const auto error = link.error(way, true)) return *error;
    }
    std::this_thread::sleep_for(1ms);
  }
  return "no error in time";
}

void expect_nothing_left(CopyPair& pair) {
  pair.links.clear();
  EXPECT_EQ(pair.world.num_blocks(), 0);
  EXPECT_EQ(pair.world.num_open(), 0);
  EXPECT_EQ(pair.world.num_registered(), 0);
}

TEST(CopyFaults, SizesThatDifferAreNamedBoth) {
  CopyPair pair;
  pair.connect();
  (void)pair.send(1, {100, 64});
  (void)pair.receive({100, 65});
  const std::string text = await_error(*pair.links[0]);
  EXPECT_TRUE(contains(text, "rank 0: activations from rank 0 to rank 1: piece 1 of message 1"))
      << text;
  EXPECT_TRUE(contains(text, "64 bytes and no more; rank 1 expects 65 bytes and no more")) << text;
  EXPECT_EQ(text_of<PipelineError>([&] { (void)pair.send(1, {8}); }), text);
}

TEST(CopyFaults, NumbersOfPiecesThatDiffer) {
  CopyPair pair;
  pair.connect();
  (void)pair.send(1, {8, 8});
  (void)pair.receive({8});
  const std::string text = await_error(*pair.links[0]);
  EXPECT_TRUE(contains(text, "has 8 bytes; rank 1 expects 8 bytes and no more")) << text;
}

TEST(CopyFaults, AnAbortFreesStreamsThatAreStuck) {
  CopyPair pair;
  pair.connect();
  FakeStream& compute = pair.devices[0]->compute();
  EventPtr never_sent = pair.links[0]->transfer(
      kDown, {{static_cast<std::byte*>(pair.links[0]->allocator()->allocate(8)), 8}}, nullptr);
  EventPtr never_taken = pair.send(1, {8});
  never_taken->hold_back(compute);
  never_sent->hold_back(compute);
  pair.links[0]->abort();
  pair.links[0]->drain();
  compute.record()->synchronize();
  EXPECT_TRUE(never_sent->done());
  EXPECT_TRUE(never_taken->done());
  EXPECT_EQ(text_of<PipelineError>([&] { (void)pair.send(1, {8}); }),
            "rank 0: the link was aborted");
  never_sent.reset();  // events keep the mailbox that they may wait for
  never_taken.reset();
  expect_nothing_left(pair);
}

// A copy to pageable memory may wait for the very stream that an abort is to free.
TEST(CopyFaults, AnAbortFreesStreamsWhereNoCallGetsThrough) {
  std::vector<std::byte> answer(8);  // first: the copy goes on until the links are gone
  CopyPair pair;
  pair.connect();
  EventPtr never_sent = pair.receive({8}).end;
  FakeStream& compute = pair.devices[1]->compute();
  never_sent->hold_back(compute);
  const EventPtr stuck = compute.record();
  auto* const place = static_cast<std::byte*>(pair.links[0]->allocator()->allocate(8));
  (void)pair.links[0]->transfer(kDown, {{place, 8}}, nullptr);
  auto held = pair.world.hold_calls();
  std::thread sender([&] {  // holds the link's lock, and blocks
    (void)pair.links[1]->transfer(kDown, {{answer.data(), 8}}, nullptr);
  });
  while (!pair.world.is_blocked(sender.get_id())) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(pair.links[1]->error(kUp, true), std::nullopt);
  std::thread watchdog([&] { pair.links[1]->abort(); });
  stuck->synchronize();
  held.unlock();
  watchdog.join();
  sender.join();
}

TEST(CopyFaults, ARankThatAbortsEndsItsPeer) {
  CopyPair pair;
  pair.connect();
  EXPECT_EQ(pair.links[0]->error(0, true), std::nullopt);
  const EventPtr stuck = pair.send(1, {8});
  pair.links[1]->abort();
  const std::string text = await_error(*pair.links[0]);
  EXPECT_EQ(text, "rank 0: activations from rank 0 to rank 1: rank 1 has ended its side");
  stuck->synchronize();
  EXPECT_TRUE(contains(text_of<PipelineError>([&] { (void)pair.send(1, {8}); }), text));
}

TEST(CopyFaults, ARankThatGivesUpBeforeItConnectsHoldsUpNobody) {
  CopyPair pair;
  const std::vector<Invitation> invitations = {pair.links[0]->invite(), pair.links[0]->invite()};
  EXPECT_EQ(pair.links[0]->error(kUp, true), std::nullopt);  // a watchdog may ask at any time
  pair.links[0]->abort();
  const std::string text =
      text_of<PipelineError>([&] { pair.links[1]->connect(ways_of(Rank(1)), invitations, 20s); });
  EXPECT_TRUE(contains(text, "rank 0 has ended its side")) << text;
  const auto start = std::chrono::steady_clock::now();
  pair.links[1]->abort();
  pair.links[1]->drain();
  EXPECT_LT(std::chrono::steady_clock::now() - start, 5s);
  expect_nothing_left(pair);
}

// Copies that were issued go on after an abort, so the memory that they write must still be there.
TEST(CopyFaults, MemoryStaysUntilThePeerIsThrough) {
  CopyPair pair;
  pair.connect();
  std::latch computed(1);
  pair.devices[0]->compute().launch([&] { computed.wait(); });
  (void)pair.receive({1 << 20});
  const int before = pair.world.num_copies();
  (void)pair.send(1, {1 << 20}, pair.devices[0]->compute().record());
  while (pair.world.num_copies() == before) std::this_thread::sleep_for(1ms);
  std::thread late([&] {
    std::this_thread::sleep_for(50ms);
    computed.count_down();
  });
  const auto start = std::chrono::steady_clock::now();
  pair.links[1].reset();
  EXPECT_GE(std::chrono::steady_clock::now() - start, 40ms);
  late.join();
  expect_nothing_left(pair);
}

TEST(CopyFaults, ARankThatNeverConnectsEndsTheOtherInTime) {
  CopyPair pair;
  const std::vector<Invitation> invitations = {pair.links[0]->invite(), pair.links[0]->invite()};
  const std::string text =
      text_of<PipelineError>([&] { pair.links[0]->connect(ways_of(Rank(0)), invitations, 100ms); });
  EXPECT_TRUE(contains(text, "rank 0 waited too long to connect activations from rank 0 to rank 1"))
      << text;
  expect_nothing_left(pair);
}

TEST(CopyFaults, ARankOnAnotherNodeIsAMistakeOfTheUsers) {
  CopyPair pair;
  std::vector<Invitation> invitations = {pair.links[0]->invite(), pair.links[0]->invite()};
  invitations[0][0] ^= 1;
  const std::string text =
      text_of<UserError>([&] { pair.links[1]->connect(ways_of(Rank(1)), invitations, 20s); });
  EXPECT_TRUE(contains(text, "rank 0 is on another node")) << text;
  EXPECT_TRUE(contains(text, "transport=\"nccl\"")) << text;
}

TEST(CopyFaults, AnInvitationThatWasTakenBack) {
  CopyPair pair;
  const std::vector<Invitation> invitations = {pair.links[0]->invite(), pair.links[0]->invite()};
  pair.links[0].reset();
  const std::string text =
      text_of<PipelineError>([&] { pair.links[1]->connect(ways_of(Rank(1)), invitations, 20s); });
  EXPECT_TRUE(contains(text, "cannot open /dev/shm/dualpipe-")) << text;
}

// Each call that can fail while the ranks connect: the rank that meets it says so, nobody hangs.
class CopyFaultWhileConnecting : public ::testing::TestWithParam<const char*> {};

TEST_P(CopyFaultWhileConnecting, IsNamed) {
  CopyPair pair;
  pair.world.fail(GetParam());
  std::vector<std::string> texts(2);
  std::vector<Invitation> invitations;
  texts[0] = text_of<PipelineError>([&] {
    for (int way = 0; way < 2; ++way) invitations.push_back(pair.links[0]->invite());
    run_ranks(2, [&](int rank) {
      const auto own = static_cast<std::size_t>(rank);
      try {
        pair.links[own]->connect(ways_of(Rank(rank)), invitations, 20s);
      } catch (const PipelineError&) {
        pair.links[0]->abort();  // as the watchdog does
        pair.links[1]->abort();
        throw;
      }
    });
  });
  pair.links[0]->drain();
  EXPECT_TRUE(contains(texts[0], cat("the device says no to ", GetParam())) ||
              contains(texts[0], "was aborted") || contains(texts[0], "has ended its side"))
      << texts[0];
  expect_nothing_left(pair);
}

INSTANTIATE_TEST_SUITE_P(Calls, CopyFaultWhileConnecting,
                         ::testing::Values("register_memory", "allocate", "export_block",
                                           "open_block", "copy", "write_value"));

// The same after the ranks have connected.
class CopyFaultLater : public ::testing::TestWithParam<const char*> {};

TEST_P(CopyFaultLater, IsNamed) {
  CopyPair pair;
  pair.connect();
  pair.world.fail(GetParam());
  try {
    (void)pair.send(1, {100});
    (void)pair.receive({100});
  } catch (const PipelineError&) {
    // The receiver met it; otherwise the thread that issued the send did.
  }
  std::string text;
  for (int i = 0; i < 2000 && text.empty(); ++i) {
    text = pair.links[0]->error(0, true).value_or("") + pair.links[1]->error(0, true).value_or("");
    std::this_thread::sleep_for(1ms);
  }
  EXPECT_TRUE(contains(text, cat("the device says no to ", GetParam()))) << text;
  expect_nothing_left(pair);
}

INSTANTIATE_TEST_SUITE_P(Calls, CopyFaultLater, ::testing::Values("copy", "write_value"));

}  // namespace
}  // namespace dualpipe
