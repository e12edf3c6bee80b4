#include "device/device_pool.h"

#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace dualpipe {

struct DevicePool::State {
  State(std::shared_ptr<Device> of, Stream& by, std::shared_ptr<Allocator> allocator)
      : device(std::move(of)), reader(by), memory(std::move(allocator)) {}

  struct Returned {
    std::shared_ptr<Buffer> buffer;
    EventPtr free;
  };

  Returned take(std::size_t num_bytes) {
    const std::size_t capacity = BufferPool::capacity_for(num_bytes);
    if (auto oldest = take_returned(capacity)) return *std::move(oldest);
    // Without the lock: the allocator may need the interpreter's, whose holder may give back.
    return {memory.acquire(capacity), reader.record()};
  }

  // The one released first: its reads are the most likely to have finished.
  std::optional<Returned> take_returned(std::size_t capacity) {
    const std::lock_guard lock(mutex);
    std::vector<Returned>& waiting = returned[capacity];
    if (waiting.empty()) return std::nullopt;
    Returned oldest = std::move(waiting.front());
    waiting.erase(waiting.begin());
    return oldest;
  }

  void give_back(std::shared_ptr<Buffer> buffer) noexcept try {
    EventPtr free = reader.record();
    const std::lock_guard lock(mutex);
    const std::size_t capacity = buffer->capacity();
    returned[capacity].push_back({std::move(buffer), std::move(free)});
  } catch (const std::exception&) {
    // The device is broken and its events mean nothing; the next user will get the error.
  }

  const std::shared_ptr<Device> device;  // keeps the reader alive
  Stream& reader;
  BufferPool memory;
  std::mutex mutex;
  std::map<std::size_t, std::vector<Returned>> returned;  // by capacity, oldest first
};

DevicePool::DevicePool(std::shared_ptr<Device> device, Stream& reader,
                       std::shared_ptr<Allocator> allocator)
    : state_(std::make_shared<State>(std::move(device), reader, std::move(allocator))) {}

DevicePool::Lease DevicePool::acquire(std::size_t num_bytes) {
  auto [buffer, free] = state_->take(num_bytes);
  std::byte* const data = buffer->data();
  auto give_back = [state = state_, buffer = std::move(buffer)](std::byte*) mutable {
    state->give_back(std::move(buffer));
  };
  return {data, std::move(free), std::shared_ptr<void>(data, std::move(give_back))};
}

BufferPool::Statistics DevicePool::statistics() const { return state_->memory.statistics(); }

}  // namespace dualpipe
