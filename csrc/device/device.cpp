#include "device/device.h"

#include <thread>

namespace dualpipe {
namespace {

class HostWork final : public Stream {
 public:
  EventPtr record() override { return nullptr; }
  [[nodiscard]] void* handle() const override { return nullptr; }
};

class HostDevice final : public Device {
 public:
  void begin() override {}
  Stream& compute() override { return work_; }
  Stream& reduction(std::size_t) override { return work_; }
  void reduce(std::size_t, const std::function<void()>& work) override { work(); }
  std::unique_ptr<Stream> new_stream() override { return std::make_unique<HostWork>(); }
  std::shared_ptr<Allocator> allocator() override { return host_allocator(); }

 private:
  HostWork work_;
};

}  // namespace

bool done_within(const Event& event, std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!event.done()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return true;
}

std::shared_ptr<Device> host_device() { return std::make_shared<HostDevice>(); }

}  // namespace dualpipe
