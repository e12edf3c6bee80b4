#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "comm/framed_transport.h"
#include "comm/harness.h"
#include "comm/loopback.h"
#include "comm/memory_link.h"
#include "common/error.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;
using Extremes = HostTransport::Extremes;
using Transports = std::vector<std::unique_ptr<HostTransport>>;

LinkFabric& fabric() {
  static LinkFabric shared;
  return shared;
}

Transports framed(int num_ranks) {
  static std::uint32_t instance = 0;
  ++instance;
  Transports transports;
  for (int rank = 0; rank < num_ranks; ++rank) {
    transports.push_back(
        framed_transport(fabric().link(Rank(rank)), {Rank(rank), num_ranks, {}, instance}));
  }
  return transports;
}

Transports loopback(int num_ranks) {
  const auto hub = LoopbackHub::create(num_ranks);
  Transports transports;
  for (int rank = 0; rank < num_ranks; ++rank) transports.push_back(hub->transport(Rank(rank)));
  return transports;
}

class Agreement : public ::testing::TestWithParam<std::function<Transports(int)>> {};

INSTANTIATE_TEST_SUITE_P(Over, Agreement, ::testing::Values(&framed, &loopback));

TEST_P(Agreement, IsOnTheExtremesOfAllRanks) {
  for (const int num_ranks : {1, 2, 3, 8}) {
    auto transports = GetParam()(num_ranks);
    run_ranks(num_ranks, [&](int rank) {
      HostTransport& transport = *transports[static_cast<std::size_t>(rank)];
      for (std::uint64_t step = 1; step <= 20; ++step) {
        transport.begin_step(step_info(static_cast<std::int64_t>(step)));
        const std::uint64_t own = step * 100 + static_cast<std::uint64_t>(rank);
        const std::uint64_t last = step * 100 + static_cast<std::uint64_t>(num_ranks) - 1;
        EXPECT_EQ(transport.agree(own), (Extremes{step * 100, last}));
        EXPECT_EQ(transport.agree(rank == 0 ? step : 0), (Extremes{step, step}));
        EXPECT_EQ(transport.agree(0), (Extremes{0, 0}));
        transport.end_step();
      }
    });
  }
}

TEST_P(Agreement, EndsWithTheStep) {
  auto transports = GetParam()(2);
  for (auto& transport : transports) transport->begin_step(step_info());
  std::thread aborter([&] { transports[0]->abort({Rank(1), 1, "rank 1 gave up"}); });
  EXPECT_EQ(text_of<PipelineError>([&] { (void)transports[0]->agree(1); }), "rank 1 gave up");
  aborter.join();
}

}  // namespace
}  // namespace dualpipe
