#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "memory/message.h"

namespace dualpipe {

using Tensors = std::vector<at::Tensor>;  // undefined: None

// A view of the tensors as a message in the memory of `device`; it owns references, and copies of
// those that are not contiguous or elsewhere. UserError on tensors that cannot travel (sparse, more
// than kMaxDims dimensions).
[[nodiscard]] Message message_of(const Tensors& tensors, at::Device device);

// The tensors of a message on `device`, as leaves; with_grad: those whose sender asked for a
// gradient require one. A message in device memory is on `device`. There and on the host they share
// the message's memory and keep its owner alive, but for those without a gradient in a message that
// shares its sender's: a stage may change them in place, and autograd, which counts versions of
// tensors, would not see that the sender saved them.
[[nodiscard]] Tensors tensors_of(Message message, at::Device device, bool with_grad);

}  // namespace dualpipe
