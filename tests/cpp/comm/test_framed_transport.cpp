#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "comm/conformance.h"
#include "comm/frame.h"
#include "comm/framed_transport.h"
#include "comm/harness.h"
#include "comm/memory_link.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using namespace std::chrono_literals;

std::vector<std::unique_ptr<Transport>> make_transports(LinkFabric& fabric, int num_ranks,
                                                        std::uint32_t instance = 0) {
  std::vector<std::unique_ptr<Transport>> transports;
  for (int rank = 0; rank < num_ranks; ++rank) {
    std::vector<Rank> peers;
    for (int peer = 0; peer < num_ranks; ++peer) {
      if (peer != rank) peers.emplace_back(peer);
    }
    transports.push_back(
        framed_transport(fabric.link(Rank(rank)), {Rank(rank), num_ranks, peers, instance}));
  }
  return transports;
}

class FramedConformance : public ::testing::TestWithParam<conformance::Check> {};

TEST_P(FramedConformance, Holds) {
  LinkFabric fabric;
  GetParam().run([&](int num_ranks) { return make_transports(fabric, num_ranks); });
}

INSTANTIATE_TEST_SUITE_P(Threads, FramedConformance, ::testing::ValuesIn(conformance::checks()),
                         [](const auto& info) { return info.param.name; });

// Counts what a link carries.
class CountingLink final : public ByteLink {
 public:
  CountingLink(std::unique_ptr<ByteLink> link, std::atomic<int>& num_sends)
      : link_(std::move(link)), num_sends_(num_sends) {}
  std::unique_ptr<ByteOperation> send(Rank to, std::uint32_t tag, std::byte* data,
                                      std::size_t num_bytes) override {
    ++num_sends_;
    return link_->send(to, tag, data, num_bytes);
  }
  std::unique_ptr<ByteOperation> receive(Rank from, std::uint32_t tag, std::byte* data,
                                         std::size_t capacity) override {
    return link_->receive(from, tag, data, capacity);
  }

 private:
  std::unique_ptr<ByteLink> link_;
  std::atomic<int>& num_sends_;
};

TEST(FramedTransport, ALargeMessageIsOneMessageOfTheLinkFromTheSecondStepOn) {
  LinkFabric fabric;
  std::atomic<int> num_sends{0};
  auto link = std::make_unique<CountingLink>(fabric.link(Rank(0)), num_sends);
  auto source = framed_transport(std::move(link), {Rank(0), 2, {Rank(1)}, 0});
  auto sink = framed_transport(fabric.link(Rank(1)), {Rank(1), 2, {Rank(0)}, 0});
  std::vector<int> sends_of_step;
  for (int step = 1; step <= 4; ++step) {
    num_sends = 0;
    const Layout layout = {bytes_spec(100'000 - 1000 * static_cast<std::uint64_t>(step))};
    run_ranks(2, [&](int rank) {
      Transport& transport = rank == 0 ? *source : *sink;
      transport.begin_step(step_info(step));
      if (rank == 0) {
        transport.send(Rank(1), activation(0), make_message(layout, 1), nullptr);
      } else {
        EXPECT_TRUE(
            has_pattern(transport.receive(Rank(0), activation(0))->wait().message, layout, 1));
      }
      transport.end_step();
    });
    sends_of_step.push_back(num_sends);
  }
  // Greeting, message, barrier.
  EXPECT_EQ(sends_of_step, (std::vector<int>{4, 3, 3, 3}));
}

TEST(FramedTransport, SendsDoNotWaitForAPeerThatIsLate) {
  LinkFabric fabric;
  auto transports = make_transports(fabric, 2);
  transports[0]->begin_step(step_info());
  transports[0]->send(Rank(1), activation(0), make_message({bytes_spec(8)}, 4), nullptr);
  transports[1]->begin_step(step_info());
  const Message message = transports[1]->receive(Rank(0), activation(0))->wait().message;
  EXPECT_TRUE(has_pattern(message, {bytes_spec(8)}, 4));
}

TEST(FramedTransport, SmallFramesDoNotOvertakeLargeOnes) {
  LinkFabric fabric;
  auto transports = make_transports(fabric, 2);
  for (auto& transport : transports) transport->begin_step(step_info());
  for (int i = 0; i < 20; ++i) {
    const Layout layout = {bytes_spec(i % 2 == 0 ? 1'000'000 : 10)};
    transports[0]->send(Rank(1), activation(i), make_message(layout, i), nullptr);
  }
  for (int i = 0; i < 20; ++i) {
    const Layout layout = {bytes_spec(i % 2 == 0 ? 1'000'000 : 10)};
    EXPECT_TRUE(
        has_pattern(transports[1]->receive(Rank(0), activation(i))->wait().message, layout, i));
  }
}

TEST(FramedTransport, PipelinesOnOneLinkDoNotMix) {
  LinkFabric fabric;
  auto first = make_transports(fabric, 2, 0);
  auto second = make_transports(fabric, 2, 1);
  for (auto* pipeline : {&first, &second}) {
    for (auto& transport : *pipeline) transport->begin_step(step_info());
  }
  second[0]->send(Rank(1), activation(0), make_message({bytes_spec(8)}, 2), nullptr);
  first[0]->send(Rank(1), activation(0), make_message({bytes_spec(8)}, 1), nullptr);
  EXPECT_TRUE(
      has_pattern(first[1]->receive(Rank(0), activation(0))->wait().message, {bytes_spec(8)}, 1));
  EXPECT_TRUE(
      has_pattern(second[1]->receive(Rank(0), activation(0))->wait().message, {bytes_spec(8)}, 2));
}

TEST(FramedTransport, ADeadPeerIsNamedWithWhatWasAwaited) {
  LinkFabric fabric;
  auto transports = make_transports(fabric, 2);
  for (auto& transport : transports) transport->begin_step(step_info());
  auto receive = transports[1]->receive(Rank(0), activation(6));
  std::thread killer([&] {
    std::this_thread::sleep_for(20ms);
    fabric.kill(Rank(0));
  });
  const std::string text = text_of<PipelineError>([&] { (void)receive->wait().message; });
  killer.join();
  EXPECT_EQ(text,
            "rank 1 waits for the activation of micro-batch 6 for stage 1 from rank 0: connection "
            "closed by peer");
  transports[1]->recover();
  EXPECT_NE(text_of<PipelineError>([&] {
              transports[1]->begin_step(step_info());
            }).find("rank 1 cannot reach rank 0"),
            std::string::npos);
}

TEST(FramedTransport, OutOfOrderWaitsOfSplitMessages) {
  LinkFabric fabric;
  auto transports = make_transports(fabric, 2);
  for (auto& transport : transports) transport->begin_step(step_info());
  const Layout large = {bytes_spec(50'000)};
  std::vector<std::unique_ptr<PendingReceive>> receives;
  for (int i = 0; i < 2; ++i) {
    transports[0]->send(Rank(1), activation(i), make_message(large, i), nullptr);
    receives.push_back(transports[1]->receive(Rank(0), activation(i)));
  }
  EXPECT_TRUE(has_pattern(receives[1]->wait().message, large, 1));
  EXPECT_TRUE(has_pattern(receives[0]->wait().message, large, 0));
}

TEST(FramedTransport, AnUnknownPeerIsABug) {
  LinkFabric fabric;
  auto transport = framed_transport(fabric.link(Rank(0)), {Rank(0), 4, {}, 0});
  transport->begin_step(step_info());
  EXPECT_THROW((void)transport->receive(Rank(2), activation(0)), InternalError);
}

TEST(Frame, HeaderAndBodyRoundTrip) {
  const Layout layout = {bytes_spec(10), bytes_spec(0, TensorSpec::kAbsent), bytes_spec(70)};
  const MessageId id{MessageKind::kMirrorHigh, Stage(3), Microbatch(9)};
  std::vector<std::byte> frame(frame_bytes(layout));
  encode_frame(make_message(layout, 2), id, 17, true, frame.data());
  const FrameHeader header = decode_header(frame.data());
  EXPECT_EQ(message_id(header), id);
  EXPECT_EQ(header.step, 17);
  EXPECT_EQ(header.num_bytes, frame.size());
  EXPECT_TRUE(header.split);
  EXPECT_TRUE(
      has_pattern(decode_body(header, frame.data() + sizeof(FrameHeader), nullptr), layout, 2));
}

TEST(Frame, GarbageIsABug) {
  const std::vector<std::byte> frame(sizeof(FrameHeader), std::byte{0xff});
  EXPECT_THROW((void)decode_header(frame.data()), InternalError);
}

TEST(Frame, GreetingCutsLongDescriptions) {
  std::vector<std::byte> bytes(kGreetingBytes);
  encode_greeting({5, 6, "short"}, bytes.data());
  EXPECT_EQ(decode_greeting(bytes.data()).description, "short");
  encode_greeting({5, 6, std::string(5000, 'x')}, bytes.data());
  const StepInfo info = decode_greeting(bytes.data());
  EXPECT_EQ(info.description, std::string(kGreetingBytes - 24, 'x'));
  EXPECT_EQ(info.step, 5);
  EXPECT_EQ(info.program_digest, 6u);
}

}  // namespace
}  // namespace dualpipe
