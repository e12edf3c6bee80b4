#include "torch/wide_product.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <string_view>

namespace dualpipe {
namespace {

// Whether this torch takes a sum that is wider than the factors, which not all versions do.
bool has_kernel(const at::TensorOptions& wide, const at::TensorOptions& narrow) {
  try {
    at::Tensor sum = at::zeros({8, 8}, wide);
    const at::Tensor factor = at::zeros({8, 8}, narrow);
    at::addmm_out(sum, sum, factor, factor, at::kFloat);
    return true;
  } catch (const c10::NotImplementedError&) {
    return false;
  } catch (const c10::Error& error) {
    if (std::string_view(error.what_without_backtrace()).find("dtype") == std::string_view::npos) {
      throw;  // out of memory, a broken device
    }
    return false;
  }
}

bool add_in_one_kernel(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  const bool narrow = left.scalar_type() == at::kBFloat16 || left.scalar_type() == at::kHalf;
  if (!narrow || sum.scalar_type() != at::kFloat || !sum.is_cuda()) return false;
  static const bool is_taken = has_kernel(sum.options(), left.options());
  if (is_taken) at::addmm_out(sum, sum, left, right, at::kFloat);
  return is_taken;
}

}  // namespace

void add_product(at::Tensor sum, const at::Tensor& left, const at::Tensor& right) {
  const at::ScalarType type = sum.scalar_type();
  if (type == left.scalar_type()) {
    sum.addmm_(left, right);
  } else if (!add_in_one_kernel(sum, left, right)) {
    sum.addmm_(left.to(type), right.to(type));
  }
}

}  // namespace dualpipe
