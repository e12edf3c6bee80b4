#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dualpipe {

inline constexpr int kMaxDims = 8;

// Describes one tensor of a message. dtype is the sender's code (torch's ScalarType); the
// core moves bytes and does not look at it.
struct TensorSpec {
  static constexpr std::int8_t kAbsent = -1;  // a None in a list of tensors

  std::int8_t dtype = kAbsent;
  std::uint8_t num_dims = 0;
  bool requires_grad = false;
  std::array<std::int64_t, kMaxDims> shape{};
  std::uint64_t num_bytes = 0;

  [[nodiscard]] bool absent() const { return dtype == kAbsent; }
  bool operator==(const TensorSpec&) const = default;
};

using Layout = std::vector<TensorSpec>;

// "[f32 4x128x256, None, ...]", for error messages.
[[nodiscard]] std::string to_string(const Layout& layout);

// The size of a message packed into one buffer: all tensors, each padded to kTensorAlignment.
inline constexpr std::size_t kTensorAlignment = 64;
[[nodiscard]] std::size_t packed_bytes(const Layout& layout);

// The tensors that one stage hands to the next for one micro-batch, or their gradients. A view:
// `owner` keeps the bytes alive, and dropping it returns them to whoever lent them.
struct Message {
  Layout layout;
  std::vector<std::byte*> data;  // one per tensor, contiguous; nullptr where absent
  std::shared_ptr<void> owner;
  bool shared = false;     // the bytes are the sender's tensors, not a transport's copy
  bool on_device = false;  // the bytes are in device memory: only streams may touch them

  [[nodiscard]] std::size_t num_tensors() const { return layout.size(); }
};

// Copies the tensors of a message to `to`, one after the other as in packed_bytes().
void pack(const Message& message, std::byte* to);

// Makes a message a view of its packed copy at `from`; the message keeps `owner`.
void repoint(Message& message, std::byte* from, std::shared_ptr<void> owner);

// Returns a view of the message packed at `from`; the view keeps `owner`.
[[nodiscard]] Message unpack(Layout layout, std::byte* from, std::shared_ptr<void> owner);

}  // namespace dualpipe
