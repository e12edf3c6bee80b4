#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/transport.h"

namespace dualpipe::testing {

// Runs body(rank) on one thread per rank, joins all, and throws the error of the lowest rank.
void run_ranks(int num_ranks, const std::function<void(int rank)>& body);

// The text of the Error that body throws, or one that says there was none. Other types propagate.
template <typename Error>
std::string text_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing of that type was thrown";
}

[[nodiscard]] inline MessageId activation(int microbatch, int stage = 1) {
  return {MessageKind::kActivation, Stage(stage), Microbatch(microbatch)};
}
[[nodiscard]] inline MessageId gradient(int microbatch, int stage = 0) {
  return {MessageKind::kGradient, Stage(stage), Microbatch(microbatch)};
}
[[nodiscard]] inline StepInfo step_info(std::int64_t step = 1) { return {step, 0xabcd, "a test"}; }

// A one-dimensional tensor of bytes; kAbsent gives a None.
[[nodiscard]] TensorSpec bytes_spec(std::uint64_t num_bytes, std::int8_t dtype = 0);

// A message that owns its bytes, filled with a pattern that depends on seed, tensor and offset.
[[nodiscard]] Message make_message(const Layout& layout, unsigned seed);

// Whether a message has this layout and the pattern of this seed.
[[nodiscard]] bool has_pattern(const Message& message, const Layout& layout, unsigned seed);

}  // namespace dualpipe::testing
