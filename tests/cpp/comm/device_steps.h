#pragma once

#include <cstdint>
#include <string>

#include "comm/device_ranks.h"

namespace dualpipe::testing {

// The greeting of a step whose input shapes only rank 0 knows.
[[nodiscard]] StepInfo shaped_step(std::int64_t step, int rank, std::uint64_t shapes);

// Takes a message as the executor does: what is computed from now on sees its bytes.
[[nodiscard]] Message take(PendingReceive& receive, FakeDevice& device);

// One step of two ranks: rank 0 sends messages of this layout and rank 1 computes with what
// arrives, all on streams.
void step_over_streams(DeviceRanks& ranks, std::int64_t step, std::uint64_t shapes,
                       const Layout& layout, int num_messages = 3);

// Runs a step that must fail on both ranks; returns the error text of the one that meets the fault.
[[nodiscard]] std::string text_of_failing_step(DeviceRanks& ranks);

}  // namespace dualpipe::testing
