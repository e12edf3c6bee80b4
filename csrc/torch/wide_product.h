#pragma once

#include <ATen/core/Tensor.h>

namespace dualpipe {

// Adds left @ right to a sum of the same or of a wider type, and rounds to no narrower one on the
// way. On CUDA bfloat16 and float16 factors of a float32 sum take one kernel; elsewhere, and where
// this torch's has no such kernel, they are cast first.
void add_product(at::Tensor sum, const at::Tensor& left, const at::Tensor& right);

}  // namespace dualpipe
