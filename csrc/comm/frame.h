#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "comm/transport.h"
#include "memory/message.h"

namespace dualpipe {

// A message as bytes: a header, the tensors' descriptions, then the packed tensors.
//
//   [FrameHeader: 64] [TensorSpec x n, padded to 64] [packed_bytes(layout)]
//                     '--------- the body: what may travel apart -------'
struct FrameHeader {
  static constexpr std::uint32_t kMagic = 0x44504d31;

  std::uint32_t magic = kMagic;
  std::uint32_t num_tensors = 0;
  std::int64_t step = 0;
  std::uint64_t num_bytes = 0;  // of the whole frame
  std::int32_t stage = 0;
  std::int32_t microbatch = 0;
  std::uint8_t kind = 0;
  bool split = false;  // the body follows as a separate message
  std::uint8_t unused[30] = {};
};
static_assert(sizeof(FrameHeader) == kTensorAlignment);

[[nodiscard]] std::size_t frame_bytes(const Layout& layout);

// Writes the frame of a message to `to`, which has room for frame_bytes().
void encode_frame(const Message& message, const MessageId& id, std::int64_t step, bool split,
                  std::byte* to);

[[nodiscard]] FrameHeader decode_header(const std::byte* frame);
[[nodiscard]] MessageId message_id(const FrameHeader& header);

// The message in a body; it keeps `owner`.
[[nodiscard]] Message decode_body(const FrameHeader& header, std::byte* body,
                                  std::shared_ptr<void> owner);

// What a rank tells its peers at the start of a step. Always kGreetingBytes long; a longer
// description is truncated.
inline constexpr std::size_t kGreetingBytes = 512;
void encode_greeting(const StepInfo& info, std::byte* to);
[[nodiscard]] StepInfo decode_greeting(const std::byte* from);

}  // namespace dualpipe
