#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "comm/copy_calls.h"

namespace dualpipe {

// Allocates device memory that other ranks write into, in blocks that each of them opens once.
// free() keeps the memory: all blocks are freed together with the allocator, since peers may have
// them open. Thread-safe.
class CopyBlocks final : public Allocator {
 public:
  explicit CopyBlocks(std::shared_ptr<CopyCalls> calls) : calls_(std::move(calls)) {}
  ~CopyBlocks() override;
  CopyBlocks(const CopyBlocks&) = delete;
  CopyBlocks& operator=(const CopyBlocks&) = delete;

  [[nodiscard]] void* allocate(std::size_t num_bytes) override;
  void free(void*) noexcept override {}

  struct Place {
    BlockHandle block;
    std::uint64_t offset;
  };
  // The place of memory that was allocated here.
  [[nodiscard]] Place find(const std::byte* data) const;

 private:
  struct Block {
    std::size_t num_bytes;
    BlockHandle handle;
  };
  [[nodiscard]] std::byte* new_block(std::size_t num_bytes);
  void put(std::byte* data, const Block& block);

  const std::shared_ptr<CopyCalls> calls_;
  std::mutex growing_;         // held during driver calls, which may be slow
  std::byte* open_ = nullptr;  // the block that small allocations come from
  std::size_t num_taken_ = 0;  // bytes taken from that block
  mutable std::mutex mutex_;  // never held during driver calls: links call find() under their locks
  std::map<std::byte*, Block> blocks_;
};

}  // namespace dualpipe
