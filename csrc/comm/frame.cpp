#include "comm/frame.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/error.h"

namespace dualpipe {
namespace {

static_assert(std::is_trivially_copyable_v<TensorSpec>);

std::size_t specs_bytes(std::size_t num_tensors) {
  return (num_tensors * sizeof(TensorSpec) + kTensorAlignment - 1) / kTensorAlignment *
         kTensorAlignment;
}

struct Greeting {
  std::int64_t step;
  std::uint64_t program_digest;
  std::uint64_t length;
  char text[kGreetingBytes - 24];
};
static_assert(sizeof(Greeting) == kGreetingBytes);

}  // namespace

std::size_t frame_bytes(const Layout& layout) {
  return sizeof(FrameHeader) + specs_bytes(layout.size()) + packed_bytes(layout);
}

void encode_frame(const Message& message, const MessageId& id, std::int64_t step, bool split,
                  std::byte* to) {
  FrameHeader header;
  header.num_tensors = static_cast<std::uint32_t>(message.num_tensors());
  header.step = step;
  header.num_bytes = frame_bytes(message.layout);
  header.stage = id.stage.value();
  header.microbatch = id.microbatch.value();
  header.kind = static_cast<std::uint8_t>(id.kind);
  header.split = split;
  std::memcpy(to, &header, sizeof(header));
  to += sizeof(header);
  if (!message.layout.empty()) {
    std::memcpy(to, message.layout.data(), message.num_tensors() * sizeof(TensorSpec));
  }
  pack(message, to + specs_bytes(message.num_tensors()));
}

FrameHeader decode_header(const std::byte* frame) {
  FrameHeader header;
  std::memcpy(&header, frame, sizeof(header));
  DUALPIPE_CHECK(header.magic == FrameHeader::kMagic, "a message that is not a frame");
  return header;
}

MessageId message_id(const FrameHeader& header) {
  return {static_cast<MessageKind>(header.kind), Stage(header.stage),
          Microbatch(header.microbatch)};
}

Message decode_body(const FrameHeader& header, std::byte* body, std::shared_ptr<void> owner) {
  Layout layout(header.num_tensors);
  if (!layout.empty()) std::memcpy(layout.data(), body, layout.size() * sizeof(TensorSpec));
  DUALPIPE_CHECK(frame_bytes(layout) == header.num_bytes, "a frame of ", header.num_bytes,
                 " bytes describes ", frame_bytes(layout));
  return unpack(std::move(layout), body + specs_bytes(header.num_tensors), std::move(owner));
}

void encode_greeting(const StepInfo& info, std::byte* to) {
  Greeting greeting{};
  greeting.step = info.step;
  greeting.program_digest = info.program_digest;
  greeting.length = std::min(info.description.size(), sizeof(greeting.text));
  std::memcpy(greeting.text, info.description.data(), greeting.length);
  std::memcpy(to, &greeting, sizeof(greeting));
}

StepInfo decode_greeting(const std::byte* from) {
  Greeting greeting;
  std::memcpy(&greeting, from, sizeof(greeting));
  const std::size_t length = std::min<std::size_t>(greeting.length, sizeof(greeting.text));
  return {greeting.step, greeting.program_digest, std::string(greeting.text, length)};
}

}  // namespace dualpipe
