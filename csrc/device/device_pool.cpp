#include "device/device_pool.h"

#include <exception>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace dualpipe {

struct DevicePool::State {
  explicit State(std::shared_ptr<Device> of) : device(std::move(of)), memory(device->allocator()) {}

  struct Returned {
    std::shared_ptr<Buffer> buffer;
    EventPtr free;
  };

  Returned take(std::size_t num_bytes) {
    const std::size_t capacity = BufferPool::capacity_for(num_bytes);
    const std::lock_guard lock(mutex);
    std::vector<Returned>& waiting = returned[capacity];
    if (waiting.empty()) {
      // An allocator may give what work that is still queued uses: safe for the compute stream
      // alone.
      return {memory.acquire(capacity), device->record()};
    }
    // The one that was let go first: most likely nobody has to wait for it.
    Returned oldest = std::move(waiting.front());
    waiting.erase(waiting.begin());
    return oldest;
  }

  void give_back(std::shared_ptr<Buffer> buffer) noexcept try {
    EventPtr free = device->record();
    const std::lock_guard lock(mutex);
    const std::size_t capacity = buffer->capacity();
    returned[capacity].push_back({std::move(buffer), std::move(free)});
  } catch (const std::exception&) {
    // The device is broken, which its next user gets to know: no event of it means anything.
  }

  const std::shared_ptr<Device> device;
  BufferPool memory;
  std::mutex mutex;
  std::map<std::size_t, std::vector<Returned>> returned;  // by capacity, oldest first
};

DevicePool::DevicePool(std::shared_ptr<Device> device)
    : state_(std::make_shared<State>(std::move(device))) {}

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
