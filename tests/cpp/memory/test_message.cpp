#include <gtest/gtest.h>

#include "comm/harness.h"
#include "common/error.h"
#include "memory/buffer_pool.h"
#include "memory/message.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;

TEST(Message, LayoutReadsLikeTensors) {
  TensorSpec matrix = bytes_spec(0, 6);
  matrix.num_dims = 3;
  matrix.shape = {4, 128, 256};
  matrix.requires_grad = true;
  TensorSpec scalar = bytes_spec(2, 15);
  scalar.num_dims = 0;
  EXPECT_EQ(
      to_string(Layout{matrix, bytes_spec(0, TensorSpec::kAbsent), scalar, bytes_spec(8, 44)}),
      "[f32 4x128x256 (requires grad), None, bf16 scalar, dtype44 8]");
  EXPECT_EQ(to_string(Layout{}), "[]");
}

TEST(Message, PackedTensorsAreAligned) {
  EXPECT_EQ(packed_bytes({}), 0u);
  EXPECT_EQ(packed_bytes({bytes_spec(0), bytes_spec(0, TensorSpec::kAbsent)}), 0u);
  EXPECT_EQ(packed_bytes({bytes_spec(1), bytes_spec(64), bytes_spec(65)}), 64u + 64u + 128u);
}

TEST(Message, PackAndUnpackAreInverse) {
  const Layout layout = {bytes_spec(3), bytes_spec(0, TensorSpec::kAbsent), bytes_spec(200),
                         bytes_spec(0), bytes_spec(64)};
  const Message message = make_message(layout, 5);
  BufferPool pool;
  auto buffer = pool.acquire(packed_bytes(layout));
  pack(message, buffer->data());
  std::byte* const data = buffer->data();
  const Message copy = unpack(layout, data, std::move(buffer));
  EXPECT_TRUE(has_pattern(copy, layout, 5));
  EXPECT_EQ(pool.statistics().bytes_in_use, 384u);
  for (const std::byte* tensor : copy.data) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor) % kTensorAlignment, 0u);
  }
}

TEST(Message, RepointTurnsAMessageIntoTheViewOfItsCopy) {
  const Layout layout = {bytes_spec(10), bytes_spec(0, TensorSpec::kAbsent), bytes_spec(20)};
  Message message = make_message(layout, 8);
  const std::weak_ptr<void> original = message.owner;
  auto storage = std::make_shared<std::array<std::byte, 128>>();
  pack(message, storage->data());
  repoint(message, storage->data(), storage);
  EXPECT_TRUE(original.expired());
  EXPECT_TRUE(has_pattern(message, layout, 8));
}

TEST(Message, PackingWithoutPointersIsABug) {
  Message message = make_message({bytes_spec(10)}, 0);
  message.data.clear();
  std::array<std::byte, 64> to;
  EXPECT_THROW(pack(message, to.data()), InternalError);
}

}  // namespace
}  // namespace dualpipe
