#include "comm/conformance.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <latch>
#include <thread>

#include "comm/harness.h"
#include "common/error.h"

namespace dualpipe::conformance {
namespace {

using namespace dualpipe::testing;
using Transports = std::vector<std::unique_ptr<Transport>>;

constexpr Rank kFirst(0);
constexpr Rank kSecond(1);

// One step of two ranks: rank 0 runs `source`, rank 1 runs `sink`.
void run_step(Transports& transports, const std::function<void(Transport&)>& source,
              const std::function<void(Transport&)>& sink, const StepInfo& info = step_info()) {
  run_ranks(2, [&](int rank) {
    Transport& transport = *transports[static_cast<std::size_t>(rank)];
    transport.begin_step(info);
    (rank == 0 ? source : sink)(transport);
    transport.end_step();
  });
}

// Sends one message of each layout and expects them in this order.
void transfer(Transports& transports, const std::vector<Layout>& layouts) {
  run_step(
      transports,
      [&](Transport& transport) {
        for (std::size_t i = 0; i < layouts.size(); ++i) {
          const int number = static_cast<int>(i);
          transport.send(kSecond, activation(number), make_message(layouts[i], i + 1), nullptr);
        }
      },
      [&](Transport& transport) {
        for (std::size_t i = 0; i < layouts.size(); ++i) {
          auto receive = transport.receive(kFirst, activation(static_cast<int>(i)));
          EXPECT_TRUE(has_pattern(receive->wait().message, layouts[i], i + 1)) << "message " << i;
        }
      });
}

void keeps_order(const Factory& factory) {
  auto transports = factory(2);
  transfer(transports, std::vector<Layout>(50, {bytes_spec(40)}));
}

void keeps_kinds_apart(const Factory& factory) {
  auto transports = factory(2);
  run_step(
      transports,
      [](Transport& transport) {
        for (int i = 0; i < 4; ++i) {
          const MessageId id{static_cast<MessageKind>(i), Stage(1), Microbatch(7)};
          transport.send(kSecond, id, make_message({bytes_spec(8)}, i), nullptr);
        }
      },
      [](Transport& transport) {
        for (int i = 3; i >= 0; --i) {
          const MessageId id{static_cast<MessageKind>(i), Stage(1), Microbatch(7)};
          EXPECT_TRUE(
              has_pattern(transport.receive(kFirst, id)->wait().message, {bytes_spec(8)}, i));
        }
      });
}

void posts_ahead_and_both_ways(const Factory& factory) {
  auto transports = factory(2);
  run_ranks(2, [&](int rank) {
    Transport& transport = *transports[static_cast<std::size_t>(rank)];
    const Rank peer(1 - rank);
    transport.begin_step(step_info());
    std::vector<std::unique_ptr<PendingReceive>> receives;
    for (int i = 0; i < 3; ++i) receives.push_back(transport.receive(peer, gradient(i)));
    for (int i = 0; i < 3; ++i) {
      transport.send(peer, gradient(i), make_message({bytes_spec(100)}, 10 * rank + i), nullptr);
    }
    for (int i = 0; i < 3; ++i) {
      const Message message = receives[static_cast<std::size_t>(i)]->wait().message;
      EXPECT_TRUE(has_pattern(message, {bytes_spec(100)}, 10 * (1 - rank) + i));
    }
    transport.end_step();
  });
}

void carries_none_and_empty(const Factory& factory) {
  auto transports = factory(2);
  const TensorSpec none = bytes_spec(0, TensorSpec::kAbsent);
  transfer(transports, {{}, {none}, {none, none}, {bytes_spec(0)}, {none, bytes_spec(5), none}});
}

void carries_all_dtypes(const Factory& factory) {
  auto transports = factory(2);
  Layout layout;
  for (std::int8_t dtype = 0; dtype < 45; ++dtype) layout.push_back(bytes_spec(16, dtype));
  layout[3].requires_grad = true;
  layout[4].num_dims = kMaxDims;
  layout[4].shape.fill(1);
  transfer(transports, {layout});
}

// Swaps a message with the other rank; sizes change and may be zero, as with gradients. Returns
// whether the peer's message arrived intact.
bool swap(Transport& transport, Rank peer, MessageKind kind, int number) {
  const Layout layout{bytes_spec(static_cast<std::uint64_t>(number % 3) * 4096)};
  const MessageId id{kind, Stage(1), Microbatch(number)};
  const auto seed = static_cast<unsigned>(kNumMessageKinds * number + static_cast<int>(kind));
  auto receive = transport.receive(peer, id);
  transport.send(peer, id, make_message(layout, seed), nullptr);
  return has_pattern(receive->wait().message, layout, seed);
}

// Each kind of message from its own thread, as gradient sums and steps use them.
void carries_for_several_threads(const Factory& factory) {
  auto transports = factory(2);
  for (std::int64_t step = 1; step <= 3; ++step) {
    run_ranks(2, [&](int rank) {
      Transport& transport = *transports[static_cast<std::size_t>(rank)];
      transport.begin_step(step_info(step));
      run_ranks(kNumMessageKinds, [&](int kind) {
        for (int i = 0; i < 40; ++i) {
          EXPECT_TRUE(swap(transport, Rank(1 - rank), static_cast<MessageKind>(kind), i));
        }
      });
      transport.end_step();
    });
  }
}

void abort_ends_all_threads(const Factory& factory) {
  auto transports = factory(2);
  run_ranks(2, [&](int rank) {
    Transport& transport = *transports[static_cast<std::size_t>(rank)];
    transport.begin_step(step_info());
    run_ranks(kNumMessageKinds + 1, [&](int number) {
      if (number == kNumMessageKinds) {
        std::this_thread::sleep_for(std::chrono::milliseconds(30));
        transport.abort({Rank(rank), 1, "the end"});
        return;
      }
      const auto swap_on = [&] {
        for (int i = 0;; ++i) {
          (void)swap(transport, Rank(1 - rank), static_cast<MessageKind>(number), i);
        }
      };
      EXPECT_THROW(swap_on(), PipelineError);
    });
  });
}

void follows_changing_layouts(const Factory& factory) {
  auto transports = factory(2);
  for (unsigned step = 0; step < 6; ++step) {  // sizes: stable, growing, shrinking, back
    const std::uint64_t size = step < 3 ? 64 : 1000 * (6 - step);
    transfer(transports, {{bytes_spec(size)},
                          {bytes_spec(64), bytes_spec(step % 2 == 0 ? 10 : 10'000)},
                          Layout(step % 3, bytes_spec(9))});
  }
}

void carries_large_messages(const Factory& factory) {
  auto transports = factory(2);
  const Layout large = {bytes_spec(std::uint64_t{8} << 20), bytes_spec(3)};
  for (int step = 0; step < 3; ++step) transfer(transports, {large, large});
}

void carries_many_tensors(const Factory& factory) {
  auto transports = factory(2);
  const Layout many(100, bytes_spec(11));
  for (int step = 0; step < 3; ++step) transfer(transports, {many});
}

void releases_sent_messages(const Factory& factory) {
  auto transports = factory(2);
  std::weak_ptr<void> sent;
  run_step(
      transports,
      [&](Transport& transport) {
        Message message = make_message({bytes_spec(64)}, 1);
        sent = message.owner;
        transport.send(kSecond, activation(0), std::move(message), nullptr);
      },
      [](Transport& transport) {
        EXPECT_TRUE(has_pattern(transport.receive(kFirst, activation(0))->wait().message,
                                {bytes_spec(64)}, 1));
      });
  EXPECT_TRUE(sent.expired());
}

void refuses_different_steps(const Factory& factory) {
  auto transports = factory(2);
  std::vector<std::string> texts(2);
  run_ranks(2, [&](int rank) {
    Transport& transport = *transports[static_cast<std::size_t>(rank)];
    texts[static_cast<std::size_t>(rank)] = text_of<UserError>([&] {
      StepInfo info = step_info(3);
      info.program_digest += static_cast<std::uint64_t>(rank);
      info.description = rank == 0 ? "8 micro-batches" : "10 micro-batches";
      transport.begin_step(info);
      auto receive = transport.receive(Rank(1 - rank), activation(0));
      transport.send(Rank(1 - rank), activation(0), make_message({bytes_spec(8)}, 0), nullptr);
      (void)receive->wait().message;
      transport.end_step();
    });
    transport.recover();
  });
  for (const std::string& text : texts) {
    EXPECT_NE(text.find("rank 0 runs \"8 micro-batches\" (run 3, "), std::string::npos) << text;
    EXPECT_NE(text.find("rank 1 runs \"10 micro-batches\" (run 3, "), std::string::npos) << text;
  }
  transfer(transports, {{bytes_spec(8)}});
}

void abort_wakes_a_blocked_wait(const Factory& factory) {
  auto transports = factory(2);
  run_ranks(2,
            [&](int rank) { transports[static_cast<std::size_t>(rank)]->begin_step(step_info()); });
  std::thread aborter([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    transports[1]->abort({Rank(0), 1, "rank 0 gave up"});
    transports[1]->abort({Rank(1), 1, "too late"});
  });
  auto receive = transports[1]->receive(kFirst, activation(0));
  EXPECT_EQ(text_of<PipelineError>([&] { (void)receive->wait().message; }), "rank 0 gave up");
  aborter.join();
}

void abort_wakes_a_blocked_commit(const Factory& factory) {
  auto transports = factory(2);
  run_ranks(2,
            [&](int rank) { transports[static_cast<std::size_t>(rank)]->begin_step(step_info()); });
  std::thread aborter([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    transports[1]->abort({Rank(0), 1, "rank 0 gave up"});
  });
  EXPECT_EQ(text_of<PipelineError>([&] { transports[1]->end_step(); }), "rank 0 gave up");
  aborter.join();
}

void throws_after_abort(const Factory& factory) {
  auto transports = factory(2);
  Transport& transport = *transports[0];
  transport.begin_step(step_info());
  auto receive = transport.receive(kSecond, gradient(0));
  transport.abort({Rank(1), 1, "over"});
  const auto text = [](const std::function<void()>& call) { return text_of<PipelineError>(call); };
  EXPECT_EQ(text([&] { (void)receive->wait().message; }), "over");
  EXPECT_EQ(text([&] { (void)transport.receive(kSecond, gradient(1)); }), "over");
  EXPECT_EQ(text([&] {
              transport.send(kSecond, activation(0), make_message({bytes_spec(8)}, 0), nullptr);
            }),
            "over");
  EXPECT_EQ(text([&] { transport.end_step(); }), "over");
  EXPECT_EQ(text([&] { transport.begin_step(step_info(2)); }), "over");
}

// Rank 0 sends messages that nobody takes, then both ranks fail; the next steps must not see them.
void recovers(const Factory& factory) {
  auto transports = factory(2);
  for (int round = 0; round < 3; ++round) {
    std::latch arrived(2);
    run_ranks(2, [&](int rank) {
      Transport& transport = *transports[static_cast<std::size_t>(rank)];
      transport.begin_step(step_info());
      if (rank == 0) {
        transport.send(kSecond, activation(0), make_message({bytes_spec(24)}, 99), nullptr);
        transport.send(kSecond, activation(1), make_message({bytes_spec(9999)}, 98), nullptr);
      } else {
        (void)transport.receive(kFirst, activation(0))->wait().message;
        (void)transport.receive(kFirst, gradient(0));
      }
      arrived.arrive_and_wait();
      transport.abort({Rank(0), 1, "a fault"});
      transport.recover();
    });
    transfer(transports, {{bytes_spec(16)}, {bytes_spec(9999)}, {bytes_spec(16)}});
  }
}

void names_a_lost_order(const Factory& factory) {
  auto transports = factory(2);
  run_ranks(2,
            [&](int rank) { transports[static_cast<std::size_t>(rank)]->begin_step(step_info()); });
  transports[0]->send(kSecond, activation(5), make_message({bytes_spec(8)}, 0), nullptr);
  auto receive = transports[1]->receive(kFirst, activation(4));
  const std::string text = text_of<PipelineError>([&] { (void)receive->wait().message; });
  EXPECT_NE(text.find("rank 0 -> rank 1"), std::string::npos) << text;
  EXPECT_NE(text.find("activation of micro-batch 4"), std::string::npos) << text;
  EXPECT_NE(text.find("activation of micro-batch 5"), std::string::npos) << text;
}

// A ring of four ranks, many steps: a rank is never more than one step ahead of another.
void commits_in_step(const Factory& factory) {
  constexpr int kRanks = 4;
  auto transports = factory(kRanks);
  std::atomic<int> entered{0};
  run_ranks(kRanks, [&](int rank) {
    Transport& transport = *transports[static_cast<std::size_t>(rank)];
    const Rank next((rank + 1) % kRanks);
    const Rank previous((rank + kRanks - 1) % kRanks);
    for (int step = 1; step <= 100; ++step) {
      transport.begin_step(step_info(step));
      auto receive = transport.receive(previous, activation(step));
      transport.send(next, activation(step), make_message({bytes_spec(32)}, step), nullptr);
      EXPECT_TRUE(has_pattern(receive->wait().message, {bytes_spec(32)}, step));
      ++entered;
      transport.end_step();
      EXPECT_GE(entered.load(), kRanks * step);
    }
  });
}

}  // namespace

const std::vector<Check>& checks() {
  static const std::vector<Check> all = {
      {"KeepsOrder", keeps_order},
      {"KeepsKindsApart", keeps_kinds_apart},
      {"PostsAheadAndBothWays", posts_ahead_and_both_ways},
      {"CarriesNoneAndEmpty", carries_none_and_empty},
      {"CarriesAllDtypes", carries_all_dtypes},
      {"CarriesForSeveralThreads", carries_for_several_threads},
      {"AbortEndsAllThreads", abort_ends_all_threads},
      {"FollowsChangingLayouts", follows_changing_layouts},
      {"CarriesLargeMessages", carries_large_messages},
      {"CarriesManyTensors", carries_many_tensors},
      {"ReleasesSentMessages", releases_sent_messages},
      {"RefusesDifferentSteps", refuses_different_steps},
      {"AbortWakesABlockedWait", abort_wakes_a_blocked_wait},
      {"AbortWakesABlockedCommit", abort_wakes_a_blocked_commit},
      {"ThrowsAfterAbort", throws_after_abort},
      {"Recovers", recovers},
      {"NamesALostOrder", names_a_lost_order},
      {"CommitsInStep", commits_in_step},
  };
  return all;
}

}  // namespace dualpipe::conformance
