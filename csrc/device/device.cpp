#include "device/device.h"

#include "common/error.h"

namespace dualpipe {
namespace {

class HostDevice final : public Device {
 public:
  void begin() override {}
  EventPtr record() override { return nullptr; }
  void wait(const EventPtr& event) override {
    if (event) event->synchronize();
  }
  std::unique_ptr<Stream> new_stream() override { throw InternalError("the host has no streams"); }
  std::shared_ptr<Allocator> allocator() override { return host_allocator(); }
};

}  // namespace

std::shared_ptr<Device> host_device() { return std::make_shared<HostDevice>(); }

}  // namespace dualpipe
