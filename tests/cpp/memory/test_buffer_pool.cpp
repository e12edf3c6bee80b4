#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "memory/buffer_pool.h"
#include "memory/message.h"

namespace dualpipe {
namespace {

class CountingAllocator final : public Allocator {
 public:
  void* allocate(std::size_t num_bytes) override {
    ++live;
    return host_allocator()->allocate(num_bytes);
  }
  void free(void* data) noexcept override {
    --live;
    host_allocator()->free(data);
  }
  std::atomic<int> live{0};
};

TEST(BufferPool, ABufferIsLargeEnoughAlignedAndNotMuchLarger) {
  BufferPool pool;
  for (std::size_t size = 0; size < 100'000; size = size * 5 / 4 + 1) {
    const auto buffer = pool.acquire(size);
    EXPECT_GE(buffer->capacity(), size);
    EXPECT_LE(buffer->capacity(), std::max<std::size_t>(256, size + size / 4)) << size;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer->data()) % kTensorAlignment, 0u);
    std::memset(buffer->data(), 1, buffer->capacity());
  }
}

TEST(BufferPool, ReusesWhatWasGivenBack) {
  BufferPool pool;
  for (int round = 0; round < 100; ++round) {
    const auto one = pool.acquire(1000);
    const auto other = pool.acquire(1000);
    const auto large = pool.acquire(1 << 20);
    EXPECT_NE(one->data(), other->data());
  }
  EXPECT_EQ(pool.statistics().num_allocations, 3u);
  EXPECT_EQ(pool.statistics().bytes_in_use, 0u);
}

TEST(BufferPool, CountsBytes) {
  BufferPool pool;
  auto buffer = pool.acquire(1024);
  { const auto other = pool.acquire(2048); }
  EXPECT_EQ(pool.statistics().bytes_in_use, 1024u);
  EXPECT_EQ(pool.statistics().peak_bytes_in_use, 3072u);
  EXPECT_EQ(pool.statistics().bytes_allocated, 3072u);
  pool.trim();
  EXPECT_EQ(pool.statistics().bytes_allocated, 1024u);
  buffer.reset();
  pool.trim();
  EXPECT_EQ(pool.statistics().bytes_allocated, 0u);
}

TEST(BufferPool, BuffersOutliveThePoolAndLeakNothing) {
  auto allocator = std::make_shared<CountingAllocator>();
  std::shared_ptr<Buffer> survivor;
  std::weak_ptr<Buffer> watcher;
  {
    BufferPool pool(allocator);
    { const auto unused = pool.acquire(10); }
    survivor = pool.acquire(5000);
    watcher = survivor;
    EXPECT_EQ(allocator->live, 2);
  }
  EXPECT_EQ(allocator->live, 1);
  std::memset(survivor->data(), 7, survivor->capacity());
  survivor.reset();
  EXPECT_TRUE(watcher.expired());
  watcher.reset();
  EXPECT_EQ(allocator->live, 0);
}

TEST(BufferPool, ManyThreadsBorrowAtOnce) {
  BufferPool pool;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&pool, thread] {
      for (std::size_t i = 0; i < 2000; ++i) {
        const auto buffer = pool.acquire(64 + i % 3000);
        std::memset(buffer->data(), thread, 64);
        std::this_thread::yield();
        EXPECT_EQ(buffer->data()[63], static_cast<std::byte>(thread));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.statistics().bytes_in_use, 0u);
}

}  // namespace
}  // namespace dualpipe
