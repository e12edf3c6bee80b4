#include "device/device.h"

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

std::shared_ptr<Device> host_device() { return std::make_shared<HostDevice>(); }

}  // namespace dualpipe
