#include "comm/device_steps.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "comm/harness.h"
#include "common/error.h"

namespace dualpipe::testing {

using namespace std::chrono_literals;

StepInfo shaped_step(std::int64_t step, int rank, std::uint64_t shapes) {
  StepInfo info = step_info(step);
  if (rank == 0) info.shapes = shapes;
  return info;
}

Message take(PendingReceive& receive, FakeDevice& device) {
  Arrival arrival = receive.wait();
  device.compute().wait(arrival.ready);
  return std::move(arrival.message);
}

void step_over_streams(DeviceRanks& ranks, std::int64_t step, std::uint64_t shapes,
                       const Layout& layout, int num_messages) {
  std::atomic<int> num_right{0};
  run_ranks(2, [&](int rank) {
    Transport& transport = *ranks.transports[static_cast<std::size_t>(rank)];
    FakeDevice& device = *ranks.devices[static_cast<std::size_t>(rank)];
    transport.begin_step(shaped_step(step, rank, shapes));
    for (int i = 0; i < num_messages; ++i) {
      if (rank == 0) {
        Message message = make_message(layout, 77);
        const Message pattern = make_message(layout, static_cast<unsigned>(i));
        device.compute().launch([message, pattern] {  // late: a reader that does not wait sees 77
          std::this_thread::sleep_for(2ms);
          for (std::size_t t = 0; t < message.num_tensors(); ++t) {
            std::memcpy(message.data[t], pattern.data[t], message.layout[t].num_bytes);
          }
        });
        transport.send(Rank(1), activation(i), std::move(message), device.compute().record());
      } else {
        const Message message = take(*transport.receive(Rank(0), activation(i)), device);
        EXPECT_TRUE(message.on_device);
        Message view = message;
        view.owner.reset();  // as in a kernel: the host releases it before the device has read it
        device.compute().launch([view, layout, i, &num_right] {
          std::this_thread::sleep_for(1ms);
          if (has_pattern(view, layout, static_cast<unsigned>(i))) ++num_right;
        });
      }
    }
    transport.end_step();
    device.compute().record()->synchronize();
  });
  EXPECT_EQ(num_right, num_messages);
}

std::string text_of_failing_step(DeviceRanks& ranks) {
  std::vector<std::string> texts(2);
  run_ranks(2, [&](int rank) {
    const auto own = static_cast<std::size_t>(rank);
    Transport& transport = *ranks.transports[own];
    texts[own] = text_of<PipelineError>([&] {
      transport.begin_step(shaped_step(9, rank, 1));
      if (rank == 0) {
        transport.send(Rank(1), activation(0), make_message({bytes_spec(64)}, 1), nullptr);
      } else {
        (void)transport.receive(Rank(0), activation(0))->wait().message;
      }
      transport.end_step();
    });
    ranks.transports[1 - own]->abort({Rank(rank), 9, "the other one"});  // as the watchdog does
  });
  run_ranks(2, [&](int rank) { ranks.transports[static_cast<std::size_t>(rank)]->recover(); });
  const std::size_t ended = texts[0] == "the other one" ? 0 : 1;
  EXPECT_EQ(texts[ended], "the other one");
  return texts[1 - ended];
}

}  // namespace dualpipe::testing
