#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/device.h"

namespace dualpipe {

// A block of one rank's device memory, as other ranks can open it.
using BlockHandle = std::array<char, 128>;

struct Copy {
  std::byte* to;
  const std::byte* from;
  std::size_t num_bytes;
};

// The few calls that messages by copy engine need, so that their link can be compiled and tested
// without CUDA: csrc/comm/cuda_copies.h has the real ones, tests/cpp/comm/fake_copies.h plays them
// with threads. Of one device. Calls that fail throw PipelineError, or UserError where the machine
// cannot do what is asked. Thread-safe.
class CopyCalls {
 public:
  virtual ~CopyCalls() = default;

  // Memory of the device that other ranks may open.
  [[nodiscard]] virtual std::byte* allocate(std::size_t num_bytes) = 0;
  virtual void free(std::byte* block) noexcept = 0;
  [[nodiscard]] virtual BlockHandle export_block(std::byte* block) = 0;
  [[nodiscard]] virtual std::byte* open_block(const BlockHandle& handle) = 0;
  virtual void close_block(const BlockHandle& handle, std::byte* block) noexcept = 0;

  // Lets all devices of this process read and write whole pages of host memory; answers where they
  // find it.
  [[nodiscard]] virtual std::byte* register_memory(std::byte* memory, std::size_t num_bytes) = 0;
  virtual void unregister_memory(std::byte* memory) noexcept = 0;

  // On a stream, without the processors that compute.
  virtual void copy(const std::vector<Copy>& copies, Stream& stream) = 0;
  // Everything that the stream did before is visible to whoever sees the value.
  virtual void write_value(std::uint32_t* at, std::uint32_t value, Stream& stream) = 0;
  // Until what is there is `value` or one of the 2^31 numbers after it, counting round.
  virtual void wait_value(std::uint32_t* at, std::uint32_t value, Stream& stream) = 0;
};

}  // namespace dualpipe
