#include "comm/copy_blocks.h"

#include <iterator>
#include <utility>

#include "common/error.h"

namespace dualpipe {
namespace {

constexpr std::size_t kBlockBytes = std::size_t{2} << 20;  // the least that CUDA maps
constexpr std::size_t kAlignment = 512;

constexpr std::size_t round_up(std::size_t num_bytes, std::size_t to) {
  return (num_bytes + to - 1) / to * to;
}

}  // namespace

CopyBlocks::~CopyBlocks() {
  for (const auto& [data, block] : blocks_) calls_->free(data);
}

void* CopyBlocks::allocate(std::size_t num_bytes) {
  const std::lock_guard lock(growing_);
  const std::size_t wanted = round_up(num_bytes, kAlignment);
  if (wanted > kBlockBytes / 2) return new_block(round_up(wanted, kBlockBytes));
  if (open_ == nullptr || num_taken_ + wanted > kBlockBytes) {
    open_ = new_block(kBlockBytes);
    num_taken_ = 0;
  }
  return open_ + std::exchange(num_taken_, num_taken_ + wanted);
}

std::byte* CopyBlocks::new_block(std::size_t num_bytes) {
  std::byte* const data = calls_->allocate(num_bytes);
  put(data, {num_bytes, {}});  // so that it is freed even if the export throws
  put(data, {num_bytes, calls_->export_block(data)});
  return data;
}

void CopyBlocks::put(std::byte* data, const Block& block) {
  const std::lock_guard lock(mutex_);
  blocks_.insert_or_assign(data, block);
}

CopyBlocks::Place CopyBlocks::find(const std::byte* data) const {
  const std::lock_guard lock(mutex_);
  const auto after = blocks_.upper_bound(const_cast<std::byte*>(data));
  DUALPIPE_CHECK(after != blocks_.begin(), "memory of somebody else");
  const auto& [start, block] = *std::prev(after);
  const auto offset = static_cast<std::size_t>(data - start);
  DUALPIPE_CHECK(offset < block.num_bytes, "memory of somebody else");
  return {block.handle, offset};
}

}  // namespace dualpipe
