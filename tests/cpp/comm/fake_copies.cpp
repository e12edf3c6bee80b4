#include "comm/fake_copies.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "common/error.h"
#include "device/fake_device.h"

namespace dualpipe::testing {
namespace {

struct Handle {
  pid_t process;
  int file;
  std::size_t num_bytes;
  std::byte* address;  // in that process
};
static_assert(sizeof(Handle) <= sizeof(BlockHandle));

std::byte* map(int file, std::size_t num_bytes) {
  void* const data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  EXPECT_NE(data, MAP_FAILED);
  return static_cast<std::byte*>(data);
}

std::atomic<std::uint32_t>& flag_at(std::uint32_t* at) {
  return *reinterpret_cast<std::atomic<std::uint32_t>*>(at);
}

}  // namespace

struct FakeCopyWorld::State {
  // Throws if a fault was set for this call or the device is broken.
  void meet_fault(const std::string& call) {
    const std::unique_lock lock = enter();
    const auto found = faults.find(call);
    const bool failing = found != faults.end() && found->second-- <= 0;
    if (failing) faults.erase(found);
    if (failing || broken) throw PipelineError("the device says no to " + call);
  }

  // Takes the lock; a thread that has to wait for it is in `blocked` meanwhile.
  std::unique_lock<std::mutex> enter() {
    std::unique_lock lock(mutex, std::try_to_lock);
    if (lock) return lock;
    const auto thread = std::this_thread::get_id();
    {
      const std::lock_guard blocked_lock(blocked_mutex);
      blocked.insert(thread);
    }
    lock.lock();
    const std::lock_guard blocked_lock(blocked_mutex);
    blocked.erase(thread);
    return lock;
  }

  std::mutex blocked_mutex;
  std::set<std::thread::id> blocked;
  std::mutex mutex;
  std::map<std::string, int> faults;  // how many calls succeed before it
  std::map<std::byte*, Handle> blocks;
  std::multiset<std::byte*> open;
  std::set<std::byte*> registered;
  int num_copies = 0;
  bool broken = false;
};

namespace {

class FakeCopies final : public CopyCalls {
 public:
  explicit FakeCopies(std::shared_ptr<FakeCopyWorld::State> state) : state_(std::move(state)) {}

  std::byte* allocate(std::size_t num_bytes) override {
    state_->meet_fault("allocate");
    const int file = memfd_create("fake_copies", MFD_CLOEXEC);
    EXPECT_EQ(ftruncate(file, static_cast<off_t>(num_bytes)), 0);
    std::byte* const block = map(file, num_bytes);
    std::memset(block, 0xEE, num_bytes);
    const std::lock_guard lock(state_->mutex);
    state_->blocks[block] = {getpid(), file, num_bytes, block};
    return block;
  }

  void free(std::byte* block) noexcept override {
    const std::lock_guard lock(state_->mutex);
    const auto found = state_->blocks.find(block);
    ASSERT_NE(found, state_->blocks.end()) << "freed twice";
    EXPECT_FALSE(state_->open.contains(block)) << "somebody has it open";
    (void)munmap(block, found->second.num_bytes);
    (void)close(found->second.file);
    state_->blocks.erase(found);
  }

  BlockHandle export_block(std::byte* block) override {
    state_->meet_fault("export_block");
    const std::lock_guard lock(state_->mutex);
    BlockHandle handle{};
    std::memcpy(handle.data(), &state_->blocks.at(block), sizeof(Handle));
    return handle;
  }

  std::byte* open_block(const BlockHandle& handle) override {
    state_->meet_fault("open_block");
    const Handle source = handle_in(handle);
    std::byte* block = source.address;
    if (source.process != getpid()) {
      const std::string path = cat("/proc/", source.process, "/fd/", source.file);
      const int file = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
      if (file < 0) throw PipelineError(cat("cannot open ", path));
      block = map(file, source.num_bytes);
      (void)close(file);
    }
    const std::lock_guard lock(state_->mutex);
    state_->open.insert(block);
    return block;
  }

  void close_block(const BlockHandle& handle, std::byte* block) noexcept override {
    const Handle source = handle_in(handle);
    if (source.process != getpid()) (void)munmap(block, source.num_bytes);
    const std::lock_guard lock(state_->mutex);
    const auto found = state_->open.find(block);
    ASSERT_NE(found, state_->open.end()) << "closed twice";
    state_->open.erase(found);
  }

  std::byte* register_memory(std::byte* memory, std::size_t num_bytes) override {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 4096, 0u);
    EXPECT_EQ(num_bytes % 4096, 0u);
    state_->meet_fault("register_memory");
    const std::lock_guard lock(state_->mutex);
    EXPECT_TRUE(state_->registered.insert(memory).second) << "registered twice";
    return memory;
  }
  void unregister_memory(std::byte* memory) noexcept override {
    const std::lock_guard lock(state_->mutex);
    EXPECT_EQ(state_->registered.erase(memory), 1u);
  }

  void copy(const std::vector<Copy>& copies, Stream& stream) override {
    state_->meet_fault("copy");
    {
      const std::lock_guard lock(state_->mutex);
      ++state_->num_copies;
    }
    launch(stream, [copies] {
      for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.num_bytes);
    });
  }
  void write_value(std::uint32_t* at, std::uint32_t value, Stream& stream) override {
    state_->meet_fault("write_value");
    launch(stream, [at, value] { flag_at(at) = value; });
  }
  void wait_value(std::uint32_t* at, std::uint32_t value, Stream& stream) override {
    state_->meet_fault("wait_value");
    launch(stream, [at, value] {
      while (static_cast<std::int32_t>(flag_at(at) - value) < 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
    });
  }

 private:
  static Handle handle_in(const BlockHandle& handle) {
    Handle source{};
    std::memcpy(&source, handle.data(), sizeof(source));
    return source;
  }
  static void launch(Stream& stream, std::function<void()> work) {
    dynamic_cast<FakeStream&>(stream).launch(std::move(work));
  }

  const std::shared_ptr<FakeCopyWorld::State> state_;
};

}  // namespace

FakeCopyWorld::FakeCopyWorld() : state_(std::make_shared<State>()) {}

std::shared_ptr<CopyCalls> FakeCopyWorld::calls() { return std::make_shared<FakeCopies>(state_); }

void FakeCopyWorld::fail(const std::string& call, int after) {
  const std::lock_guard lock(state_->mutex);
  state_->faults[call] = after;
}

void FakeCopyWorld::break_device() {
  const std::lock_guard lock(state_->mutex);
  state_->broken = true;
}

void FakeCopyWorld::mend_device() {
  const std::lock_guard lock(state_->mutex);
  state_->broken = false;
}

std::unique_lock<std::mutex> FakeCopyWorld::hold_calls() { return std::unique_lock(state_->mutex); }

bool FakeCopyWorld::is_blocked(std::thread::id thread) const {
  const std::lock_guard lock(state_->blocked_mutex);
  return state_->blocked.contains(thread);
}

int FakeCopyWorld::num_blocks() const {
  const std::lock_guard lock(state_->mutex);
  return static_cast<int>(state_->blocks.size());
}

int FakeCopyWorld::num_open() const {
  const std::lock_guard lock(state_->mutex);
  return static_cast<int>(state_->open.size());
}

int FakeCopyWorld::num_registered() const {
  const std::lock_guard lock(state_->mutex);
  return static_cast<int>(state_->registered.size());
}

int FakeCopyWorld::num_copies() const {
  const std::lock_guard lock(state_->mutex);
  return state_->num_copies;
}

}  // namespace dualpipe::testing
