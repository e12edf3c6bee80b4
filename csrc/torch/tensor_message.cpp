#include "torch/tensor_message.h"

#include <ATen/Functions.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "common/error.h"

namespace dualpipe {
namespace {

bool is_subclass(const at::Tensor& tensor) {
  return tensor.key_set().has(c10::DispatchKey::Python);
}

// The values in memory of their own: what torch's collectives return is a subclass that waits for
// them in whatever is computed with it, but has no memory itself.
at::Tensor unwrapped(const at::Tensor& tensor) {
  if (!is_subclass(tensor)) return tensor.detach();
  at::Tensor plain = at::clone(tensor.detach());
  DUALPIPE_USER_CHECK(!is_subclass(plain),
                      "only plain tensors travel between ranks; found a subclass that keeps its "
                      "values elsewhere, as a DTensor does; convert it, a DTensor with to_local() "
                      "or full_tensor(), in the stage's forward");
  return plain;
}

void check_can_travel(const at::Tensor& tensor) {
  DUALPIPE_USER_CHECK(tensor.layout() == at::kStrided,
                      "only dense tensors travel between ranks; found ", tensor.layout(),
                      "; convert it with to_dense() in the stage's forward, or make an embedding, "
                      "whose gradient it is, with sparse=False");
  DUALPIPE_USER_CHECK(tensor.dim() <= kMaxDims, "tensors between stages have at most ", kMaxDims,
                      " dimensions; found ", tensor.dim(), "; flatten some in the stage's forward");
}

TensorSpec spec_of(const at::Tensor& tensor, bool requires_grad) {
  TensorSpec spec;
  spec.dtype = static_cast<std::int8_t>(tensor.scalar_type());
  spec.num_dims = static_cast<std::uint8_t>(tensor.dim());
  spec.requires_grad = requires_grad;
  std::copy(tensor.sizes().begin(), tensor.sizes().end(), spec.shape.begin());
  spec.num_bytes = tensor.nbytes();
  return spec;
}

at::Tensor tensor_of(const TensorSpec& spec, std::byte* data, const std::shared_ptr<void>& owner,
                     at::Device device) {
  const at::IntArrayRef shape(spec.shape.data(), spec.num_dims);
  const auto options =
      at::TensorOptions().dtype(static_cast<at::ScalarType>(spec.dtype)).device(device);
  if (spec.num_bytes == 0) return at::empty(shape, options);
  return at::from_blob(data, shape, [owner](void*) {}, options);
}

}  // namespace

Message message_of(const Tensors& tensors, at::Device device) {
  Message message;
  message.on_device = !device.is_cpu();
  auto owner = std::make_shared<Tensors>();
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) {
      message.layout.emplace_back();
      message.data.push_back(nullptr);
      continue;
    }
    check_can_travel(tensor);
    at::Tensor plain = unwrapped(tensor).resolve_conj().resolve_neg().to(device).contiguous();
    message.layout.push_back(spec_of(plain, tensor.requires_grad()));
    message.data.push_back(static_cast<std::byte*>(plain.mutable_data_ptr()));
    owner->push_back(std::move(plain));
  }
  message.owner = std::move(owner);
  message.shared = true;
  return message;
}

Tensors tensors_of(Message message, at::Device device, bool with_grad) {
  Tensors tensors(message.num_tensors());
  for (std::size_t i = 0; i < message.num_tensors(); ++i) {
    const TensorSpec& spec = message.layout[i];
    if (spec.absent()) continue;
    const at::Device at = message.on_device ? device : at::Device(at::kCPU);
    at::Tensor tensor = tensor_of(spec, message.data[i], message.owner, at);
    if (at != device) tensor = tensor.to(device);
    if (with_grad && spec.requires_grad) tensor.set_requires_grad(true);
    if (with_grad && !spec.requires_grad && message.shared) tensor = tensor.clone();
    tensors[i] = std::move(tensor);
  }
  return tensors;
}

}  // namespace dualpipe
