#pragma once

#include <cstdint>
#include <string>

#include "comm/device_ranks.h"

namespace dualpipe::testing {

// The greeting of a step, whose shapes rank 0 knows.
[[nodiscard]] StepInfo shaped_step(std::int64_t step, int rank, std::uint64_t shapes);

// As the executor takes a message: what is computed from now on finds its bytes.
[[nodiscard]] Message take(PendingReceive& receive, FakeDevice& device);

// One step of two ranks; rank 0 sends `layout` and rank 1 computes with what arrives, on streams.
void step_over_streams(DeviceRanks& ranks, std::int64_t step, std::uint64_t shapes,
                       const Layout& layout, int num_messages = 3);

// What the rank that meets a fault says of its step; both ranks end.
[[nodiscard]] std::string text_of_failing_step(DeviceRanks& ranks);

}  // namespace dualpipe::testing
