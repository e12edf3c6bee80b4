#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "errors.h"
#include "memory.h"
#include "streams.h"

using simulated::fail;
using simulated::Kind;
using simulated::kind_of;
using simulated::stream_of;

namespace {

constexpr std::size_t kAlignment = 4096;

// What the host may change as soon as the call returns is read before it does.
void copy_from_pageable(void* to, const void* from, std::size_t num_bytes, cudaStream_t stream) {
  const auto* const bytes = static_cast<const std::byte*>(from);
  auto staged = std::make_shared<std::vector<std::byte>>(bytes, bytes + num_bytes);
  stream_of(stream).put([to, staged, num_bytes] { std::memcpy(to, staged->data(), num_bytes); });
}

cudaError_t copy(void* to, const void* from, std::size_t num_bytes, cudaStream_t stream) {
  if (kind_of(from) == Kind::kPageable) {
    copy_from_pageable(to, from, num_bytes, stream);
    return cudaSuccess;
  }
  stream_of(stream).put([=] { std::memcpy(to, from, num_bytes); });
  return kind_of(to) == Kind::kPageable ? cudaStreamSynchronize(stream) : cudaSuccess;
}

static_assert(sizeof(simulated::SharedBlock) <= sizeof(cudaIpcMemHandle_t));

}  // namespace

cudaError_t cudaMalloc(void** address, std::size_t num_bytes) {
  *address = simulated::allocate(num_bytes);
  return *address != nullptr ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
// Waits for all that the device was given: what a GPU does as well, and what deadlocks come from.
cudaError_t cudaFree(void* address) {
  if (address == nullptr) return cudaSuccess;
  if (kind_of(address) != Kind::kDevice) return fail(cudaErrorInvalidValue);
  simulated::after_all([address] {
    if (!simulated::release(address)) std::abort();  // not where a block begins
  });
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = simulated::free_bytes();
  *total = simulated::total_bytes();
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, std::size_t num_bytes, unsigned) {
  *address = std::aligned_alloc(kAlignment, (num_bytes / kAlignment + 1) * kAlignment);
  if (*address == nullptr) return fail(cudaErrorMemoryAllocation);
  simulated::pin(*address, num_bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* address) {
  if (!simulated::unpin(address)) return fail(cudaErrorInvalidValue);
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* address, std::size_t num_bytes, unsigned) {
  simulated::pin(address, num_bytes);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* address) {
  return simulated::unpin(address) ? cudaSuccess : fail(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaHostGetDevicePointer(void** there, void* address, unsigned) {
  *there = address;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  const Kind kind = kind_of(address);
  *attributes = {};
  attributes->type = kind == Kind::kDevice   ? cudaMemoryTypeDevice
                     : kind == Kind::kPinned ? cudaMemoryTypeHost
                                             : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t num_bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return copy(to, from, num_bytes, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t num_bytes, cudaMemcpyKind) {
  (void)copy(to, from, num_bytes, nullptr);
  return cudaStreamSynchronize(nullptr);
}
cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const std::size_t* sizes,
                                 std::size_t count, cudaMemcpyAttributes* attributes,
                                 std::size_t* first_of, std::size_t num_attributes,
                                 cudaStream_t stream) {
  if (stream == nullptr || num_attributes == 0 || first_of[0] != 0) {
    return fail(cudaErrorInvalidValue);
  }
  if (attributes->srcAccessOrder == cudaMemcpySrcAccessOrderInvalid) {
    return fail(cudaErrorInvalidValue);
  }
  for (std::size_t i = 0; i < count; ++i) (void)copy(to[i], from[i], sizes[i], stream);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, std::size_t num_bytes, cudaStream_t stream) {
  stream_of(stream).put([=] { std::memset(address, value, num_bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* address, int value, std::size_t num_bytes) {
  (void)cudaMemsetAsync(address, value, num_bytes, nullptr);
  return cudaStreamSynchronize(nullptr);
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* address) {
  simulated::SharedBlock block{};
  if (!simulated::share(address, &block)) return fail(cudaErrorInvalidValue);
  std::memcpy(handle, &block, sizeof(block));
  return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** address, cudaIpcMemHandle_t handle, unsigned) {
  simulated::SharedBlock block{};
  std::memcpy(&block, &handle, sizeof(block));
  *address = simulated::open(block);
  return *address != nullptr ? cudaSuccess : fail(cudaErrorInvalidValue);
}
cudaError_t cudaIpcCloseMemHandle(void* address) {
  return simulated::close(address) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
