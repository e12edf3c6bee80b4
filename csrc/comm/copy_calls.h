#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/device.h"

namespace dualpipe {

// Names a block of one rank's device memory, so that other ranks can open it.
using BlockHandle = std::array<char, 128>;

struct Copy {
  std::byte* to;
  const std::byte* from;
  std::size_t num_bytes;
};

// The few calls that the copy link makes to one device, so that it can be compiled and tested
// without CUDA: csrc/comm/cuda_copies.h has the real ones, tests/cpp/comm/fake_copies.h fakes them
// with threads. Calls that fail throw PipelineError, or UserError if the machine cannot do what is
// asked. Thread-safe.
class CopyCalls {
 public:
  virtual ~CopyCalls() = default;

  // Device memory that other ranks may open.
  [[nodiscard]] virtual std::byte* allocate(std::size_t num_bytes) = 0;
  virtual void free(std::byte* block) noexcept = 0;
  [[nodiscard]] virtual BlockHandle export_block(std::byte* block) = 0;
  [[nodiscard]] virtual std::byte* open_block(const BlockHandle& handle) = 0;
  virtual void close_block(const BlockHandle& handle, std::byte* block) noexcept = 0;

  // Lets all devices of this process read and write whole pages of host memory; returns where the
  // devices find it.
  [[nodiscard]] virtual std::byte* register_memory(std::byte* memory, std::size_t num_bytes) = 0;
  virtual void unregister_memory(std::byte* memory) noexcept = 0;

  // Copies on a stream, by copy engine if possible, so as not to take processors from computation.
  virtual void copy(const std::vector<Copy>& copies, Stream& stream) = 0;
  // Writes a flag on a stream. Whoever sees the value sees everything that the stream did before.
  virtual void write_value(std::uint32_t* at, std::uint32_t value, Stream& stream) = 0;
  // Makes a stream wait until *at has reached `value`: int32(*at - value) >= 0, as both wrap.
  virtual void wait_value(std::uint32_t* at, std::uint32_t value, Stream& stream) = 0;
};

}  // namespace dualpipe
