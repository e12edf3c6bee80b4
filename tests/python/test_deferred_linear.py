"""Linear layers that leave their weight gradients to the W of a micro-batch."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dualpipe_ext import _C
from dualpipe_ext.weight_grad import defer_weight_gradients, undo_defer_weight_gradients
from dualpipe_ext.weight_report import WeightSplit

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BATCH, WIDTH, HIDDEN = 6, 5, 7


class Conv1D(nn.Module):
    """GPT-2's linear layer, as transformers has it: its weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = x.size()[:-1] + (self.nf,)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> type[Conv1D]:
    """Conv1D under the module name it has in transformers."""
    module = ModuleType("transformers.pytorch_utils")
    monkeypatch.setattr(Conv1D, "__module__", module.__name__)
    module.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Conv1D


@contextmanager
def backward_pass(queue: Any, defer: bool = True, microbatch: int = 0) -> Iterator[None]:
    queue.begin_backward(0, microbatch, defer)
    try:
        with queue.scope():
            yield
    finally:
        queue.end_backward()


def split_step(
    queue: Any, model: Callable[..., Tensor], *inputs: Tensor, microbatch: int = 0
) -> Tensor:
    """F and I of a micro-batch; returns the output."""
    with queue.scope():
        output = model(*inputs)
    with backward_pass(queue, microbatch=microbatch):
        loss_of(output).backward()
    return output.detach()


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().sum() if output.dtype == torch.bfloat16 else (output**2).sum()


def reference_step(model: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    output = model(*inputs)
    loss_of(output).backward()
    return output.detach()


def grads_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_grads(model: nn.Module, reference: nn.Module) -> None:
    """Bit for bit."""
    expected = grads_of(reference)
    for name, grad in grads_of(model).items():
        wanted = expected[name]
        assert (grad is None) == (wanted is None), name
        if grad is not None and wanted is not None:
            assert grad.dtype == wanted.dtype and grad.stride() == wanted.stride(), name
            assert torch.equal(grad, wanted), (name, (grad - wanted).abs().max())


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model, which defers, and a copy that does not."""
    reference = copy.deepcopy(model)
    defer_weight_gradients(model)
    return model, reference


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN, bias=bias), nn.GELU(), nn.Linear(HIDDEN, WIDTH, bias=bias)
    )


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def twin(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


class CountProducts(TorchDispatchMode):
    """Counts the kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(self.calls[f"aten::{name}"] for name in ("mm", "addmm", "addmm_", "linear"))


# What one micro-batch computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(WIDTH,), (BATCH, WIDTH), (2, 3, WIDTH), (2, 3, 4, WIDTH)])
def test_equals_autograd_bit_for_bit(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp(bias).to(dtype))
    x = leaf(*shape, dtype=dtype)
    y = twin(x)
    assert torch.equal(split_step(queue, model, x), reference_step(reference, y))
    assert all(grad is None for grad in grads_of(model).values())
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    assert queue.num_pending == 2
    queue.run(0, 0)
    assert queue.num_pending == 0
    assert_same_grads(model, reference)


@pytest.mark.parametrize("defer", [True, False])
def test_accumulates_in_place_over_microbatches(defer: bool) -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp().double())
    inputs = [leaf(BATCH, WIDTH, dtype=torch.float64) for _ in range(4)]
    sums = []
    for microbatch, x in enumerate(inputs):
        with queue.scope():
            output = model(x)
        with backward_pass(queue, defer, microbatch):
            loss_of(output).backward()
        queue.run(0, microbatch)
        reference_step(reference, twin(x))
        sums.append(model[0].weight.grad)  # type: ignore[union-attr,index]
    assert all(grad is sums[0] for grad in sums)
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(grad, grads_of(reference)[name], rtol=1e-13, atol=1e-13)


def test_interleaved_microbatches_stay_apart() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp().double())
    inputs = [leaf(BATCH, WIDTH, dtype=torch.float64) for _ in range(3)]
    with queue.scope():
        outputs = [model(x) for x in inputs]
    for microbatch, output in enumerate(outputs):
        with backward_pass(queue, microbatch=microbatch):
            loss_of(output).backward()
    assert queue.num_pending == 6
    queue.run(0, 1)
    assert queue.num_pending == 4
    reference_step(reference, twin(inputs[1]))
    assert_same_grads(model, reference)
    queue.run(0, 1)
    assert_same_grads(model, reference)


def test_non_contiguous_tensors() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp().double())
    base = torch.randn(WIDTH, 3, 2, dtype=torch.float64)
    x = base.permute(2, 1, 0).detach().requires_grad_()
    y = base.permute(2, 1, 0).detach().requires_grad_()
    with queue.scope():
        output = model(x).transpose(0, 1)
    with backward_pass(queue):
        output.sum().backward()
    queue.run(0, 0)
    model_output = reference(y).transpose(0, 1)
    model_output.sum().backward()
    assert torch.equal(output, model_output)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-14, atol=0)
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(grad, grads_of(reference)[name], rtol=1e-13, atol=1e-14)


def test_gradient_has_the_strides_of_its_parameter() -> None:
    queue = _C.WeightQueue()
    layer = nn.Linear(WIDTH, HIDDEN, bias=False)
    layer.weight = nn.Parameter(torch.randn(WIDTH, HIDDEN).t())
    model, reference = pair(layer)
    x = leaf(BATCH, WIDTH)
    split_step(queue, model, x)
    queue.run(0, 0)
    reference_step(reference, twin(x))
    assert_same_grads(model, reference)


def test_empty_batch() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp())
    x = leaf(0, 3, WIDTH)
    split_step(queue, model, x)
    queue.run(0, 0)
    reference_step(reference, twin(x))
    assert_same_grads(model, reference)


def test_output_may_be_changed_in_place() -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, HIDDEN))
    x = leaf(2, 3, WIDTH)
    y = twin(x)
    assert torch.equal(
        split_step(queue, lambda t: layer(t).relu_(), x),
        reference_step(lambda t: reference(t).relu_(), y),
    )
    queue.run(0, 0)
    assert_same_grads(layer, reference)


def test_input_changed_after_forward_is_an_error() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    x = torch.randn(BATCH, WIDTH)
    with queue.scope():
        output = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_no_gradient_mode_is_plain() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp())
    x = torch.randn(BATCH, WIDTH)
    with queue.scope(), torch.no_grad():
        assert torch.equal(model(x), reference(x))
    with queue.scope(), torch.inference_mode():
        assert torch.equal(model(x), reference(x))


# No work twice, no memory longer than needed


def test_no_product_is_computed_twice() -> None:
    queue = _C.WeightQueue()
    model, _ = pair(mlp())
    x = leaf(BATCH, WIDTH)
    with queue.scope():
        output = model(x)
    loss = loss_of(output)
    with CountProducts() as in_i, backward_pass(queue):
        loss.backward()
    assert in_i.products == 2
    assert in_i.calls["aten::sum"] == 0
    with CountProducts() as in_w:
        queue.run(0, 0)
    assert in_w.products == 2


def test_first_layer_has_nothing_to_do_in_i() -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, HIDDEN))
    x = torch.randn(BATCH, WIDTH)
    with queue.scope():
        loss = loss_of(layer(x))
    with CountProducts() as in_i, backward_pass(queue):
        loss.backward()
    assert in_i.products == 0
    queue.run(0, 0)
    reference_step(reference, x)
    assert_same_grads(layer, reference)


def test_second_microbatch_adds_within_the_product() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN, bias=False))
    for microbatch in range(2):
        split_step(queue, layer, torch.randn(BATCH, WIDTH), microbatch=microbatch)
    queue.run(0, 0)
    with CountProducts() as in_w:
        queue.run(0, 1)
    assert in_w.calls["aten::addmm_"] == 1
    assert in_w.calls["aten::mm"] == in_w.calls["aten::add_"] == 0


def test_memory_of_a_microbatch_is_free_after_w() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    x = torch.randn(BATCH, WIDTH)
    storage = weakref.ref(x.untyped_storage())
    split_step(queue, layer, x)
    alive = weakref.ref(x)
    del x
    gc.collect()
    del storage, alive
    freed = Freed()
    y = torch.from_numpy(freed.array())
    split_step(queue, layer, y, microbatch=1)
    del y
    gc.collect()
    assert not freed.happened
    queue.run(0, 1)
    gc.collect()
    assert freed.happened


class Freed:
    """Tells when the memory of an array has been given back."""

    def __init__(self) -> None:
        self.happened = False

    def array(self) -> Any:
        import numpy as np

        array = np.ones((BATCH, WIDTH), dtype=np.float32)
        weakref.finalize(array, self._note)
        return array

    def _note(self) -> None:
        self.happened = True


def test_waiting_task_keeps_no_graph_alive() -> None:
    queue = _C.WeightQueue()
    model, _ = pair(mlp())
    x = leaf(BATCH, WIDTH)
    with queue.scope():
        hidden = model[0](x)  # type: ignore[index]
        output = model[2](hidden)  # type: ignore[index]
    node = weakref.ref(hidden.grad_fn)
    del hidden
    with backward_pass(queue):
        loss_of(output).backward()
    del output
    gc.collect()
    assert queue.num_pending == 2
    assert node() is None


# Parameters: frozen, shared, with hooks, with main_grad


def test_frozen_weight_saves_no_input() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp())
    for m in (model, reference):
        m[0].weight.requires_grad_(False)  # type: ignore[index,union-attr,operator]
        m[2].bias.requires_grad_(False)  # type: ignore[index,union-attr,operator]
    x = leaf(BATCH, WIDTH)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), queue.scope():
        model[0](x)  # type: ignore[index]
    assert [tuple(t.shape) for t in saved] == [(HIDDEN, WIDTH)]
    y = twin(x)
    split_step(queue, model, x)
    queue.run(0, 0)
    reference_step(reference, y)
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    assert_same_grads(model, reference)


def test_everything_frozen() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp().requires_grad_(False))
    x = leaf(BATCH, WIDTH)
    y = twin(x)
    split_step(queue, model, x)
    assert queue.num_pending == 0
    reference_step(reference, y)
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    with queue.scope():
        assert not model(x.detach()).requires_grad


def test_layer_used_twice_in_one_microbatch() -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, WIDTH).double())
    x = leaf(BATCH, WIDTH, dtype=torch.float64)
    y = twin(x)
    split_step(queue, lambda t: layer(F.gelu(layer(t))), x)
    queue.run(0, 0)
    reference_step(lambda t: reference(F.gelu(reference(t))), y)
    for name, grad in grads_of(layer).items():
        torch.testing.assert_close(grad, grads_of(reference)[name], rtol=1e-13, atol=1e-13)


class TiedModel(nn.Module):
    """An embedding whose weight is the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.gelu(self.embedding(tokens)))


def test_tied_weight() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(TiedModel().double())
    assert model.embedding.weight is model.head.weight  # type: ignore[union-attr]
    tokens = torch.arange(HIDDEN)
    split_step(queue, model, tokens)
    queue.run(0, 0)
    reference_step(reference, tokens)
    torch.testing.assert_close(
        grads_of(model)["embedding.weight"],
        grads_of(reference)["embedding.weight"],
        rtol=1e-13,
        atol=1e-13,
    )


@pytest.mark.parametrize("defer", [True, False])
def test_post_accumulate_hook_is_called_once_with_the_whole_gradient(defer: bool) -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, WIDTH).double())
    seen: list[Tensor] = []
    layer.weight.register_post_accumulate_grad_hook(  # type: ignore[union-attr,operator]
        lambda parameter: seen.append(parameter.grad.clone())
    )
    x = leaf(BATCH, WIDTH, dtype=torch.float64)
    with queue.scope():
        output = layer(F.gelu(layer(x)))
    with backward_pass(queue, defer):
        loss_of(output).backward()
    assert len(seen) == (0 if defer else 1)
    queue.run(0, 0)
    assert len(seen) == 1
    reference_step(lambda t: reference(F.gelu(reference(t))), twin(x))
    wanted = grads_of(reference)["weight"]
    torch.testing.assert_close(seen[0], wanted, rtol=1e-13, atol=1e-13)


def test_tensor_hook_changes_the_gradient() -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, HIDDEN).double())
    for m in (layer, reference):
        m.weight.register_hook(lambda grad: 2 * grad)  # type: ignore[union-attr,operator]
        m.bias.register_hook(lambda grad: grad.clamp(max=0.1))  # type: ignore[union-attr,operator]
    inputs = [leaf(BATCH, WIDTH, dtype=torch.float64) for _ in range(3)]
    for microbatch, x in enumerate(inputs):
        split_step(queue, layer, x, microbatch=microbatch)
    for microbatch, x in enumerate(inputs):
        queue.run(0, microbatch)
        reference_step(reference, twin(x))
    assert_same_grads(layer, reference)


def test_hook_of_the_gradient_accumulator() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    node = torch.autograd.graph.get_gradient_edge(layer.weight).node  # type: ignore[arg-type]
    calls: list[bool] = []
    node.register_hook(lambda *_: calls.append(layer.weight.grad is not None))
    split_step(queue, layer, leaf(BATCH, WIDTH))
    assert calls == []
    queue.run(0, 0)
    assert calls == [True]


def test_hook_registered_between_i_and_w_is_called() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    split_step(queue, layer, leaf(BATCH, WIDTH))
    calls: list[nn.Parameter] = []
    layer.weight.register_post_accumulate_grad_hook(calls.append)  # type: ignore[union-attr,operator]
    queue.run(0, 0)
    assert len(calls) == 1


class HookError(Exception):
    pass


def test_exception_of_a_hook_leaves_w_unchanged() -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, HIDDEN))

    def fail(parameter: Tensor) -> None:
        raise HookError("the hook's own words")

    handle = layer.weight.register_post_accumulate_grad_hook(fail)  # type: ignore[union-attr,operator]
    split_step(queue, layer, leaf(BATCH, WIDTH))
    with pytest.raises(HookError, match="the hook's own words"):
        queue.run(0, 0)
    assert queue.num_pending == 0
    handle.remove()
    layer.zero_grad()
    x = leaf(BATCH, WIDTH)
    split_step(queue, layer, x)
    queue.run(0, 0)
    reference_step(reference, twin(x))
    assert_same_grads(layer, reference)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_is_used_instead_of_grad(dtype: torch.dtype, hooked: bool) -> None:
    queue = _C.WeightQueue()
    layer = nn.Linear(WIDTH, HIDDEN).to(dtype)
    defer_weight_gradients(layer)
    reference = copy.deepcopy(layer)
    calls: list[Tensor] = []
    wanted = {name: torch.zeros(p.shape) for name, p in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)  # type: ignore[attr-defined]
        if hooked:
            parameter.register_post_accumulate_grad_hook(calls.append)
    for microbatch in range(3):
        x = torch.randn(BATCH, WIDTH, dtype=dtype)
        split_step(queue, layer, x, microbatch=microbatch)
        queue.run(0, microbatch)
        reference.zero_grad()
        reference_step(reference, x)
        for name, parameter in reference.named_parameters():
            assert parameter.grad is not None
            wanted[name] += parameter.grad
    assert len(calls) == (6 if hooked else 0)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None
        main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(main_grad, wanted[name], rtol=1e-6, atol=1e-6)


# Autocast


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("layer_type", ["linear", "conv1d"])
def test_autocast_equals_autograd(cache: bool, layer_type: str, transformers: type[Conv1D]) -> None:
    queue = _C.WeightQueue()
    layer = nn.Linear(WIDTH, HIDDEN) if layer_type == "linear" else transformers(HIDDEN, WIDTH)
    model, reference = pair(nn.Sequential(layer, nn.GELU(), nn.Linear(HIDDEN, WIDTH)))
    x = leaf(2, 3, WIDTH)
    y = twin(x)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        with queue.scope():
            output = model(x)
        wanted = reference(y)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, wanted)
    with backward_pass(queue):
        output.float().square().sum().backward()
    queue.run(0, 0)
    wanted.float().square().sum().backward()
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    assert_same_grads(model, reference)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_autocast_leaves_its_weight_cache_to_others() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    with torch.autocast("cpu", torch.bfloat16):
        with queue.scope():
            layer(torch.randn(BATCH, WIDTH))
        plain = F.linear(torch.randn(BATCH, WIDTH), layer.weight)  # type: ignore[arg-type]
    plain.float().sum().backward()
    assert layer.weight.grad is not None


def test_w_under_autocast_keeps_its_precision() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp())
    x = leaf(BATCH, WIDTH)
    split_step(queue, model, x)
    with torch.autocast("cpu", torch.bfloat16):
        queue.run(0, 0)
    reference_step(reference, twin(x))
    assert_same_grads(model, reference)


# Together with other parts of torch


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_activation_checkpointing(use_reentrant: bool, autocast: bool) -> None:
    queue = _C.WeightQueue()
    model, reference = pair(nn.Sequential(mlp(), nn.Dropout(0.3), mlp()))
    x = leaf(2, 3, WIDTH)
    y = twin(x)

    def run(block: nn.Module, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return checkpoint(block, t, use_reentrant=use_reentrant)

    torch.manual_seed(1)
    with queue.scope():
        output = run(model, x)
    torch.manual_seed(1)
    wanted = run(reference, y)
    assert torch.equal(output, wanted)
    with CountProducts() as in_i, backward_pass(queue):
        loss_of(output).backward()
    assert in_i.products == 8  # four recomputed, four for the inputs
    assert all(grad is None for grad in grads_of(model).values())
    queue.run(0, 0)
    loss_of(wanted).backward()
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    assert_same_grads(model, reference)


def test_saved_tensor_hooks_see_input_and_weight() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp())
    x = leaf(BATCH, WIDTH)
    with torch.autograd.graph.save_on_cpu(), queue.scope():
        output = model(x)
    with backward_pass(queue):
        loss_of(output).backward()
    queue.run(0, 0)
    reference_step(reference, twin(x))
    assert_same_grads(model, reference)


def test_second_derivative_is_refused() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    x = leaf(BATCH, WIDTH)
    with queue.scope():
        loss = loss_of(layer(x))
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice.*create_graph"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_compiled_model_is_plain() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = leaf(BATCH, WIDTH)
    with queue.scope():
        output = compiled(x)
    assert torch.equal(output, reference(x))
    with backward_pass(queue):
        loss_of(output).backward()
    assert queue.num_pending == 0
    assert model[0].weight.grad is not None  # type: ignore[index,union-attr]


def test_backward_after_the_queue_is_gone_is_plain() -> None:
    model, reference = pair(mlp())
    x = leaf(BATCH, WIDTH)
    queue = _C.WeightQueue()
    with queue.scope():
        output = model(x)
    del queue
    loss_of(output).backward()
    reference_step(reference, twin(x))
    assert_same_grads(model, reference)


def test_backward_outside_of_a_pass_is_plain() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp())
    x = leaf(BATCH, WIDTH)
    with queue.scope():
        output = model(x)
    loss_of(output).backward()
    assert queue.num_pending == 0
    reference_step(reference, twin(x))
    assert_same_grads(model, reference)


def test_parameter_that_is_no_leaf_is_plain() -> None:
    queue = _C.WeightQueue()
    weight = leaf(HIDDEN, WIDTH)
    with queue.scope():
        output = _C.deferred_linear(torch.randn(BATCH, WIDTH), weight * 2, None)
    with backward_pass(queue):
        loss_of(output).backward()
    assert queue.num_pending == 0
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_weight(dtype: torch.dtype, transformers: type[Conv1D]) -> None:
    queue = _C.WeightQueue()
    model, reference = pair(
        nn.Sequential(transformers(HIDDEN, WIDTH), nn.GELU(), transformers(WIDTH, HIDDEN)).to(dtype)
    )
    x = leaf(2, 3, WIDTH, dtype=dtype)
    y = twin(x)
    assert torch.equal(split_step(queue, model, x), reference_step(reference, y))
    assert all(grad is None for grad in grads_of(model).values())
    queue.run(0, 0)
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    assert_same_grads(model, reference)


# Queues


def test_two_threads_with_a_queue_each() -> None:
    steps = 50
    models = [pair(mlp().double()) for _ in range(2)]
    inputs = [torch.randn(steps, BATCH, WIDTH, dtype=torch.float64) for _ in range(2)]
    barrier = threading.Barrier(2)
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            queue = _C.WeightQueue()
            barrier.wait()
            for step in range(steps):
                split_step(queue, models[rank][0], inputs[rank][step], microbatch=step)
                queue.run(0, step)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for (model, reference), data in zip(models, inputs, strict=True):
        for x in data:
            reference_step(reference, x)
        for name, grad in grads_of(model).items():
            torch.testing.assert_close(grad, grads_of(reference)[name], rtol=1e-12, atol=1e-12)


def test_scopes_nest_and_belong_to_their_thread() -> None:
    outer, inner = _C.WeightQueue(), _C.WeightQueue()
    assert _C.current_weight_queue() is None
    with outer.scope():
        with inner.scope():
            assert _C.current_weight_queue() is inner
        assert _C.current_weight_queue() is outer
        elsewhere: list[object] = []
        thread = threading.Thread(target=lambda: elsewhere.append(_C.current_weight_queue()))
        thread.start()
        thread.join()
        assert elsewhere == [None]
    assert _C.current_weight_queue() is None


def test_scope_reaches_the_threads_of_autograd() -> None:
    queue = _C.WeightQueue()
    seen: list[object] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(_C.current_weight_queue())
            return grad

    output = Look.apply(leaf(2))
    with backward_pass(queue):
        output.sum().backward()
    assert seen == [queue]


def test_clear_forgets_what_a_failed_step_left() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(mlp())
    split_step(queue, model, leaf(BATCH, WIDTH))
    queue.begin_backward(0, 1, True)
    queue.clear()
    assert queue.num_pending == 0 and not queue.deferring
    queue.run(0, 0)
    assert all(grad is None for grad in grads_of(model).values())
    x = leaf(BATCH, WIDTH)
    split_step(queue, model, x)
    queue.run(0, 0)
    reference_step(reference, twin(x))
    assert_same_grads(model, reference)


# Patching


def test_patched_module_computes_the_same_outside_of_an_engine() -> None:
    model, reference = pair(mlp())
    x = leaf(BATCH, WIDTH)
    y = twin(x)
    assert torch.equal(reference_step(model, x), reference_step(reference, y))
    assert_same_grads(model, reference)
    (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    grad.sum().backward()


def test_patching_keeps_names_and_hooks_and_is_idempotent() -> None:
    model = mlp()
    names = list(model.state_dict())
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    defer_weight_gradients(model)
    forward = model[0].forward
    defer_weight_gradients(model)
    assert model[0].forward == forward
    queue = _C.WeightQueue()
    split_step(queue, model, leaf(BATCH, WIDTH))
    assert list(model.state_dict()) == names
    assert calls == [1]
    assert queue.num_pending == 2
    undo_defer_weight_gradients(model)
    assert "forward" not in model[0].__dict__
    split_step(queue, model, leaf(BATCH, WIDTH), microbatch=1)
    assert queue.num_pending == 2


def test_deep_copy_defers_to_its_own_parameters() -> None:
    queue = _C.WeightQueue()
    model = mlp()
    defer_weight_gradients(model)
    twin_model = copy.deepcopy(model)
    split_step(queue, twin_model, leaf(BATCH, WIDTH))
    queue.run(0, 0)
    assert all(grad is None for grad in grads_of(model).values())
    assert all(grad is not None for grad in grads_of(twin_model).values())


def test_unpickled_module_is_plain_and_can_be_patched_again() -> None:
    queue = _C.WeightQueue()
    model = mlp()
    defer_weight_gradients(model)
    loaded = pickle.loads(pickle.dumps(model))
    x = torch.randn(BATCH, WIDTH)
    assert torch.equal(loaded(x), model(x))
    split_step(queue, loaded, x)
    assert queue.num_pending == 0
    assert all(grad is not None for grad in grads_of(loaded).values())
    assert all(grad is None for grad in grads_of(model).values())
    defer_weight_gradients(loaded)
    split_step(queue, loaded, x)
    assert queue.num_pending == 2
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


# The report


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class Mixed(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)
        self.own = OwnLinear(10, 10, bias=False)
        self.norm = nn.LayerNorm(10)
        self.normed = parametrizations.weight_norm(nn.Linear(10, 10))
        self.frozen = nn.Linear(10, 10).requires_grad_(False)
        self.attention = nn.MultiheadAttention(10, 2)
        self.scale = nn.Parameter(torch.ones(10))
        self.tied = nn.Linear(10, 10, bias=False)
        self.tied.weight = self.linear.weight


def test_report_counts_every_weight_once_and_says_why() -> None:
    model = Mixed()
    report = defer_weight_gradients(model)
    by_name = {m.name: m for m in report.modules}
    assert by_name["linear"].split is WeightSplit.NATIVE
    assert by_name["linear"].num_weights == 110
    assert by_name["tied"].num_weights == 0
    assert by_name["own"].split is WeightSplit.STORE
    assert "forward of its own" in by_name["own"].reason
    assert by_name[""].split is WeightSplit.STORE
    assert by_name["norm"].split is WeightSplit.NONE
    assert "computed from other parameters" in by_name["normed"].reason
    assert by_name["frozen"].reason == "frozen" and by_name["frozen"].num_weights == 0
    assert by_name["attention.out_proj"].split is WeightSplit.NONE
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.num_weights() == total
    assert report.num_weights(WeightSplit.NATIVE) == 110
    assert sum(report.share(split) for split in WeightSplit) == pytest.approx(1)
    assert report.share(WeightSplit.NATIVE) == pytest.approx(110 / total)


def test_report_reads_as_a_table_and_as_data() -> None:
    report = defer_weight_gradients(Mixed())
    lines = str(report).splitlines()
    assert lines[0].split() == ["share", "weights", "gradients"]
    assert any(line.endswith("deferred natively") and "110" in line for line in lines)
    assert any(line.startswith("norm ") and "LayerNorm" in line for line in lines)
    assert not any(line.startswith("linear ") for line in lines)
    data = report.to_dict()
    assert data["num_weights"] == report.num_weights()
    shares = data["shares"]
    assert isinstance(shares, dict) and set(shares) == {"native", "store", "none"}


def test_report_of_a_module_without_parameters() -> None:
    report = defer_weight_gradients(nn.GELU())
    assert report.modules == () and report.share(WeightSplit.NATIVE) == 0
    assert "0.0%" in str(report)


def test_layers_with_a_forward_of_their_own_are_left_alone() -> None:
    layer = OwnLinear(WIDTH, HIDDEN)
    replaced = nn.Linear(WIDTH, HIDDEN)
    replaced.forward = lambda x: x  # type: ignore[method-assign,assignment]
    report = defer_weight_gradients(nn.Sequential(layer, replaced, nn.LazyLinear(3)))
    assert "forward" not in layer.__dict__
    assert replaced(1) == 1
    assert [m.split for m in report.modules] == [
        WeightSplit.STORE,
        WeightSplit.NONE,
        WeightSplit.NONE,
    ]
