#include "comm/cuda_copy_batch.h"

namespace dualpipe {
namespace {

#if CUDART_VERSION >= 13000

cudaError_t copy_batch(std::vector<void*>& to, std::vector<void*>& from,
                       std::vector<std::size_t>& sizes, cudaMemcpyAttributes attributes,
                       cudaStream_t stream) {
  std::size_t first = 0;
  return cudaMemcpyBatchAsync(to.data(), from.data(), sizes.data(), sizes.size(), &attributes,
                              &first, 1, stream);
}

#elif CUDART_VERSION >= 12080

cudaError_t copy_batch(std::vector<void*>& to, std::vector<void*>& from,
                       std::vector<std::size_t>& sizes, cudaMemcpyAttributes attributes,
                       cudaStream_t stream) {
  std::size_t first = 0;
  std::size_t failed = 0;
  return cudaMemcpyBatchAsync(to.data(), from.data(), sizes.data(), sizes.size(), &attributes,
                              &first, 1, &failed, stream);
}

#endif

}  // namespace

#if CUDART_VERSION >= 12080

cudaError_t copy_beside_computation(const std::vector<Copy>& copies, cudaStream_t stream) {
  std::vector<void*> to;
  std::vector<void*> from;
  std::vector<std::size_t> sizes;
  for (const Copy& copy : copies) {
    to.push_back(copy.to);
    from.push_back(const_cast<std::byte*>(copy.from));
    sizes.push_back(copy.num_bytes);
  }
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  return copy_batch(to, from, sizes, attributes, stream);
}

#else

cudaError_t copy_beside_computation(const std::vector<Copy>&, cudaStream_t) {
  return cudaErrorNotSupported;
}

#endif

}  // namespace dualpipe
