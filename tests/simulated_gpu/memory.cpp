#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace simulated {
namespace {

constexpr std::size_t kTotalBytes = std::size_t{8} << 30;
constexpr int kPoison = 0xff;

struct Block {
  std::size_t num_bytes;
  int file;  // of its own blocks; -1: of another process, or pinned
  Kind kind;
};

struct Blocks {
  std::mutex mutex;
  std::map<std::uintptr_t, Block> by_address;
  std::size_t num_bytes = 0;  // of the device, this process's own
};

Blocks& blocks() {
  static auto* const all = new Blocks;
  return *all;
}

std::uintptr_t number(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

void* map(int file, std::size_t num_bytes) {
  void* const at = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return at == MAP_FAILED ? nullptr : at;
}

void note(void* address, Block block) {
  const std::lock_guard lock(blocks().mutex);
  blocks().by_address[number(address)] = block;
}

// Removes what begins there, if it is of that kind and was made here or not.
bool forget(void* address, Kind kind, bool is_own, Block* forgotten) {
  const std::lock_guard lock(blocks().mutex);
  const auto found = blocks().by_address.find(number(address));
  if (found == blocks().by_address.end() || found->second.kind != kind) return false;
  if ((found->second.file >= 0) != is_own) return false;
  *forgotten = found->second;
  blocks().by_address.erase(found);
  if (is_own) blocks().num_bytes -= forgotten->num_bytes;
  return true;
}

bool reserve(std::size_t num_bytes) {
  const std::lock_guard lock(blocks().mutex);
  if (blocks().num_bytes + num_bytes > kTotalBytes) return false;
  blocks().num_bytes += num_bytes;
  return true;
}

}  // namespace

void* allocate(std::size_t num_bytes) {
  if (!reserve(num_bytes)) return nullptr;
  const int file = memfd_create("simulated_gpu", MFD_CLOEXEC);
  const bool is_made = file >= 0 && ftruncate(file, static_cast<off_t>(num_bytes)) == 0;
  void* const at = is_made ? map(file, num_bytes) : nullptr;
  if (at == nullptr) {
    std::perror("simulated GPU: memory of the device");
    std::abort();
  }
  std::memset(at, kPoison, num_bytes);
  note(at, {num_bytes, file, Kind::kDevice});
  return at;
}

bool release(void* address) {
  Block block{};
  if (!forget(address, Kind::kDevice, true, &block)) return false;
  munmap(address, block.num_bytes);
  ::close(block.file);
  return true;
}

Kind kind_of(const void* address) {
  const std::lock_guard lock(blocks().mutex);
  auto after = blocks().by_address.upper_bound(number(address));
  if (after == blocks().by_address.begin()) return Kind::kPageable;
  const auto& [start, block] = *--after;
  return number(address) < start + block.num_bytes ? block.kind : Kind::kPageable;
}

void pin(void* address, std::size_t num_bytes) { note(address, {num_bytes, -1, Kind::kPinned}); }

bool unpin(void* address) {
  Block block{};
  return forget(address, Kind::kPinned, false, &block);
}

std::size_t free_bytes() {
  const std::lock_guard lock(blocks().mutex);
  return kTotalBytes - blocks().num_bytes;
}

std::size_t total_bytes() { return kTotalBytes; }

bool share(const void* address, SharedBlock* block) {
  const std::lock_guard lock(blocks().mutex);
  const auto found = blocks().by_address.find(number(address));
  if (found == blocks().by_address.end() || found->second.file < 0) return false;
  *block = {getpid(), found->second.file, found->second.num_bytes};
  return true;
}

void* open(const SharedBlock& block) {
  const std::string path =
      "/proc/" + std::to_string(block.process) + "/fd/" + std::to_string(block.file);
  const int file = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) return nullptr;
  void* const at = map(file, block.num_bytes);
  ::close(file);
  if (at != nullptr) note(at, {block.num_bytes, -1, Kind::kDevice});
  return at;
}

bool close(void* address) {
  Block block{};
  if (!forget(address, Kind::kDevice, false, &block)) return false;
  munmap(address, block.num_bytes);
  return true;
}

}  // namespace simulated
