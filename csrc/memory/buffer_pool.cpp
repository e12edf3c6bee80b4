#include "memory/buffer_pool.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "common/error.h"
#include "memory/message.h"

namespace dualpipe {
namespace {

constexpr std::size_t kMinBufferBytes = 256;
constexpr std::size_t kControlBytes = 64;  // enough for the control block of a shared_ptr<Buffer>
constexpr std::size_t kClassesPerDoubling = 4;

class HostAllocator final : public Allocator {
 public:
  void* allocate(std::size_t num_bytes) override {
    void* data = std::aligned_alloc(kTensorAlignment, num_bytes);
    if (data == nullptr) throw std::bad_alloc();
    return data;
  }
  void free(void* data) noexcept override { std::free(data); }
};

// Four size classes per doubling: above the minimum, at most a fifth of a buffer is unused.
std::size_t round_to_class(std::size_t num_bytes) {
  if (num_bytes <= kMinBufferBytes) return kMinBufferBytes;
  const std::size_t quantum = std::bit_floor(num_bytes - 1) / kClassesPerDoubling;
  return (num_bytes + quantum - 1) / quantum * quantum;
}

std::size_t class_index(std::size_t capacity) {
  const std::size_t floor = std::bit_floor(capacity);
  const auto doublings = static_cast<std::size_t>(std::countr_zero(floor));
  return doublings * kClassesPerDoubling + (capacity - floor) / (floor / kClassesPerDoubling);
}

}  // namespace

std::shared_ptr<Allocator> host_allocator() {
  static const auto allocator = std::make_shared<HostAllocator>();
  return allocator;
}

// A buffer with room for its shared_ptr's control block, so that lending it allocates nothing.
struct BufferPool::Block {
  Block(std::byte* data, std::size_t capacity) : buffer(data, capacity) {}
  Buffer buffer;
  Block* next = nullptr;
  alignas(std::max_align_t) std::byte control[kControlBytes];
};

struct BufferPool::State {
  explicit State(std::shared_ptr<Allocator> source) : allocator(std::move(source)) {}
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() { trim(); }

  Block* take(std::size_t capacity);
  Block* take_free(std::size_t capacity);
  void give_back(Block* block) noexcept;
  void trim() noexcept;

  const std::shared_ptr<Allocator> allocator;
  std::mutex mutex;
  std::vector<Block*> free_lists =
      std::vector<Block*>(64 * kClassesPerDoubling, nullptr);  // by class_index
  Statistics statistics;
};

BufferPool::Block* BufferPool::State::take_free(std::size_t capacity) {
  const std::lock_guard lock(mutex);
  Block*& head = free_lists[class_index(capacity)];
  Block* const block = head;
  if (block != nullptr) head = block->next;
  return block;
}

BufferPool::Block* BufferPool::State::take(std::size_t capacity) {
  Block* block = take_free(capacity);
  const bool is_new = block == nullptr;
  if (is_new) {  // without the lock: the allocator may need the interpreter's, whose holder may
                 // free
    block = new Block(static_cast<std::byte*>(allocator->allocate(capacity)), capacity);
  }
  const std::lock_guard lock(mutex);
  if (is_new) {
    ++statistics.num_allocations;
    statistics.bytes_allocated += capacity;
  }
  statistics.bytes_in_use += capacity;
  statistics.peak_bytes_in_use = std::max(statistics.peak_bytes_in_use, statistics.bytes_in_use);
  return block;
}

void BufferPool::State::give_back(Block* block) noexcept {
  const std::lock_guard lock(mutex);
  Block*& head = free_lists[class_index(block->buffer.capacity())];
  block->next = head;
  head = block;
  statistics.bytes_in_use -= block->buffer.capacity();
}

void BufferPool::State::trim() noexcept {
  const std::lock_guard lock(mutex);
  for (Block*& head : free_lists) {
    while (head != nullptr) {
      Block* block = std::exchange(head, head->next);
      statistics.bytes_allocated -= block->buffer.capacity();
      allocator->free(block->buffer.data());
      delete block;
    }
  }
}

namespace {

// Places the control block in the buffer's own Block. The buffer returns to its pool when the
// control block is deallocated, which is the last thing a shared_ptr does.
template <typename T, typename State, typename Block>
struct ControlAllocator {
  using value_type = T;
  template <typename U>
  struct rebind {
    using other = ControlAllocator<U, State, Block>;
  };

  ControlAllocator(std::shared_ptr<State> state_in, Block* block_in)
      : state(std::move(state_in)), block(block_in) {}
  template <typename U>
  ControlAllocator(const ControlAllocator<U, State, Block>& other)
      : state(other.state), block(other.block) {}

  T* allocate([[maybe_unused]] std::size_t count) {
    static_assert(sizeof(T) <= kControlBytes && alignof(T) <= alignof(std::max_align_t));
    return reinterpret_cast<T*>(block->control);
  }
  void deallocate(T*, std::size_t) noexcept { state->give_back(block); }

  template <typename U>
  bool operator==(const ControlAllocator<U, State, Block>& other) const {
    return block == other.block;
  }

  std::shared_ptr<State> state;
  Block* block;
};

struct KeepBuffer {
  void operator()(Buffer*) const noexcept {}
};

}  // namespace

BufferPool::BufferPool(std::shared_ptr<Allocator> allocator)
    : state_(std::make_shared<State>(std::move(allocator))) {}

BufferPool::~BufferPool() { state_->trim(); }

std::shared_ptr<Buffer> BufferPool::acquire(std::size_t num_bytes) {
  Block* block = state_->take(capacity_for(num_bytes));
  return {&block->buffer, KeepBuffer{}, ControlAllocator<Buffer, State, Block>(state_, block)};
}

std::size_t BufferPool::capacity_for(std::size_t num_bytes) { return round_to_class(num_bytes); }

void BufferPool::trim() { state_->trim(); }

BufferPool::Statistics BufferPool::statistics() const {
  const std::lock_guard lock(state_->mutex);
  return state_->statistics;
}

}  // namespace dualpipe
