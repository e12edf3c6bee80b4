#pragma once

namespace dualpipe {

// Makes a GPU this thread's current one, and the one before it again at the end: unless this
// process does not use that one, where going back would leave a context and its memory. Threads of
// our own have never chosen a GPU and count as having the first.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// A call of the CUDA driver by its name, so that nothing is linked to the driver, which machines
// without a GPU lack. UserError where the driver does not have it.
[[nodiscard]] void* find_driver_call(const char* name);
template <typename Call>
[[nodiscard]] Call* driver_call(const char* name) {
  return reinterpret_cast<Call*>(find_driver_call(name));
}

}  // namespace dualpipe
