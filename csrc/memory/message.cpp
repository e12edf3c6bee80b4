#include "memory/message.h"

#include <cstring>

#include "common/error.h"

namespace dualpipe {
namespace {

constexpr std::size_t align_up(std::size_t num_bytes) {
  return (num_bytes + kTensorAlignment - 1) / kTensorAlignment * kTensorAlignment;
}

// The codes of c10::ScalarType that messages carry in practice; others are shown by number.
const char* dtype_name(std::int8_t dtype) {
  static constexpr const char* kNames[] = {"u8",  "i8",  "i16",  "i32", "i64",  "f16",
                                           "f32", "f64", "c32",  "c64", "c128", "bool",
                                           "qi8", "qu8", "qi32", "bf16"};
  const auto index = static_cast<std::size_t>(dtype);
  return dtype >= 0 && index < std::size(kNames) ? kNames[index] : nullptr;
}

void append_spec(std::ostringstream& out, const TensorSpec& spec) {
  if (spec.absent()) {
    out << "None";
    return;
  }
  const char* name = dtype_name(spec.dtype);
  if (name != nullptr) {
    out << name;
  } else {
    out << "dtype" << int{spec.dtype};
  }
  out << ' ';
  if (spec.num_dims == 0) out << "scalar";
  for (int dim = 0; dim < spec.num_dims; ++dim) {
    out << (dim == 0 ? "" : "x") << spec.shape[static_cast<std::size_t>(dim)];
  }
  if (spec.requires_grad) out << " (requires grad)";
}

}  // namespace

std::string to_string(const Layout& layout) {
  std::ostringstream out;
  out << '[';
  for (std::size_t i = 0; i < layout.size(); ++i) {
    if (i > 0) out << ", ";
    append_spec(out, layout[i]);
  }
  out << ']';
  return out.str();
}

std::size_t packed_bytes(const Layout& layout) {
  std::size_t total = 0;
  for (const TensorSpec& spec : layout) total += align_up(spec.num_bytes);
  return total;
}

void pack(const Message& message, std::byte* to) {
  DUALPIPE_CHECK(message.data.size() == message.layout.size(), "a message of ",
                 message.layout.size(), " tensors has ", message.data.size(), " pointers");
  for (std::size_t i = 0; i < message.layout.size(); ++i) {
    const std::size_t num_bytes = message.layout[i].num_bytes;
    if (num_bytes > 0) std::memcpy(to, message.data[i], num_bytes);
    to += align_up(num_bytes);
  }
}

void repoint(Message& message, std::byte* from, std::shared_ptr<void> owner) {
  message.data.resize(message.layout.size());
  for (std::size_t i = 0; i < message.layout.size(); ++i) {
    const TensorSpec& spec = message.layout[i];
    message.data[i] = spec.absent() ? nullptr : from;
    from += align_up(spec.num_bytes);
  }
  message.owner = std::move(owner);
  message.shared = false;
}

Message unpack(Layout layout, std::byte* from, std::shared_ptr<void> owner) {
  Message message{std::move(layout), {}, nullptr};
  repoint(message, from, std::move(owner));
  return message;
}

}  // namespace dualpipe
