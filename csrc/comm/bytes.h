#pragma once

#include <cstddef>

#include "memory/message.h"

namespace dualpipe {

// Bytes as a message of host memory, and back.
[[nodiscard]] Message bytes_message(const void* data, std::size_t num_bytes);
void read_bytes(const Message& message, void* data, std::size_t num_bytes);

}  // namespace dualpipe
