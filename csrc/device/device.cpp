#include "device/device.h"

namespace dualpipe {
namespace {

class HostDevice final : public Device {
 public:
  std::shared_ptr<Event> record() override { return nullptr; }
  void wait(const std::shared_ptr<Event>& event) override {
    if (event) event->synchronize();
  }
};

}  // namespace

std::unique_ptr<Device> host_device() { return std::make_unique<HostDevice>(); }

}  // namespace dualpipe
