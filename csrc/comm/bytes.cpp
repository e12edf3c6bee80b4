#include "comm/bytes.h"

#include <cstring>

#include "common/error.h"

namespace dualpipe {

Message bytes_message(const void* data, std::size_t num_bytes) {
  auto bytes = std::make_shared<std::vector<std::byte>>(num_bytes);
  if (num_bytes > 0) std::memcpy(bytes->data(), data, num_bytes);
  TensorSpec spec;
  spec.dtype = 0;
  spec.num_dims = 1;
  spec.shape[0] = static_cast<std::int64_t>(num_bytes);
  spec.num_bytes = num_bytes;
  Message message{{spec}, {bytes->data()}, nullptr};
  message.owner = std::move(bytes);
  return message;
}

void read_bytes(const Message& message, void* data, std::size_t num_bytes) {
  DUALPIPE_CHECK(message.num_tensors() == 1 && message.layout[0].num_bytes == num_bytes,
                 "expected ", num_bytes, " bytes, got ", to_string(message.layout));
  if (num_bytes > 0) std::memcpy(data, message.data[0], num_bytes);
}

}  // namespace dualpipe
