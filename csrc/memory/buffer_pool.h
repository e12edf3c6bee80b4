#pragma once

#include <cstddef>
#include <memory>

namespace dualpipe {

// Where a pool takes memory from: the host's heap here, pinned or device memory elsewhere.
class Allocator {
 public:
  virtual ~Allocator() = default;
  [[nodiscard]] virtual void* allocate(std::size_t num_bytes) = 0;
  virtual void free(void* data) noexcept = 0;
};

[[nodiscard]] std::shared_ptr<Allocator> host_allocator();  // aligned to kTensorAlignment

// A piece of pooled memory; releasing the last reference returns it to the pool.
class Buffer {
 public:
  Buffer(std::byte* data, std::size_t capacity) : data_(data), capacity_(capacity) {}
  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] std::size_t capacity() const { return capacity_; }

 private:
  std::byte* data_;
  std::size_t capacity_;
};

// Reuses buffers by size: once it has as many of each size as are ever live at the same time, it
// allocates no more. Thread-safe; buffers may outlive the pool.
class BufferPool {
 public:
  explicit BufferPool(std::shared_ptr<Allocator> allocator = host_allocator());
  ~BufferPool();

  [[nodiscard]] std::shared_ptr<Buffer> acquire(std::size_t num_bytes);

  // The capacity of the buffer that acquire(num_bytes) returns.
  [[nodiscard]] static std::size_t capacity_for(std::size_t num_bytes);

  // Frees all buffers that are not in use.
  void trim();

  struct Statistics {
    std::size_t num_allocations = 0;  // ever
    std::size_t bytes_allocated = 0;  // now, used or not
    std::size_t bytes_in_use = 0;
    std::size_t peak_bytes_in_use = 0;
  };
  [[nodiscard]] Statistics statistics() const;

 private:
  struct Block;
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace dualpipe
