#pragma once

namespace dualpipe {

// Makes a GPU this thread's current one and restores the previous one at the end, unless this
// process has no context on it: restoring it would create one, which takes memory. Threads of our
// own have never chosen a GPU, so their previous one is the first.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// Looks up a call of the CUDA driver by name, so that nothing is linked against the driver, which
// machines without a GPU lack. Throws UserError if the driver does not have it.
[[nodiscard]] void* find_driver_call(const char* name);
template <typename Call>
[[nodiscard]] Call* driver_call(const char* name) {
  return reinterpret_cast<Call*>(find_driver_call(name));
}

}  // namespace dualpipe
