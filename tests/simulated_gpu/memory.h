#pragma once

#include <cstddef>

namespace simulated {

enum class Kind { kDevice, kPinned, kPageable };

// Memory of the device is shared memory without a name, full of 0xff (NaN, as a number) when new.
// Null where there is not enough. Any thread.
[[nodiscard]] void* allocate(std::size_t num_bytes);
// Whether it was memory of the device; one block of it whole.
[[nodiscard]] bool release(void* address);
[[nodiscard]] Kind kind_of(const void* address);

void pin(void* address, std::size_t num_bytes);
[[nodiscard]] bool unpin(void* address);

[[nodiscard]] std::size_t free_bytes();
[[nodiscard]] std::size_t total_bytes();

// Where another process finds a block of this one, and the block there. Null: it is not found.
struct SharedBlock {
  int process;
  int file;
  std::size_t num_bytes;
};
[[nodiscard]] bool share(const void* address, SharedBlock* block);
[[nodiscard]] void* open(const SharedBlock& block);
[[nodiscard]] bool close(void* address);

}  // namespace simulated
