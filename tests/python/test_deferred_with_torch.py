"""Deferred layers under autocast, activation checkpointing, saved-tensor hooks and compilation."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from deferral import (
    BATCH,
    DTYPES,
    HIDDEN,
    MLP,
    WIDTH,
    Conv1D,
    CountKernels,
    assert_equal,
    assert_same_grads,
    backward_pass,
    has_no_grads,
    leaf,
    loss_of,
    pair,
    plain_step,
    split_step,
    twin,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualpipe_ext import _C
from dualpipe_ext.weight_report import weight_split


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def conv1d(monkeypatch: pytest.MonkeyPatch) -> type[Conv1D]:
    """Conv1D under the module name that it has in transformers."""
    module = ModuleType("transformers.pytorch_utils")
    monkeypatch.setattr(Conv1D, "__module__", module.__name__)
    monkeypatch.setattr(module, "Conv1D", Conv1D, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Conv1D


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_weight(dtype: torch.dtype, conv1d: type[Conv1D]) -> None:
    queue = _C.WeightQueue()
    layers = nn.Sequential(conv1d(HIDDEN, WIDTH), nn.GELU(), conv1d(WIDTH, HIDDEN))
    model, reference = pair(layers.to(dtype))
    x = leaf(2, 3, WIDTH, dtype=dtype)
    y = twin(x)
    assert_equal(split_step(queue, model, x), plain_step(reference, y))
    assert has_no_grads(model)
    queue.run(0, 0)
    assert_equal(x.grad, y.grad)
    assert_same_grads(model, reference)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_autocast_equals_autograd(cache: bool, transposed: bool, conv1d: type[Conv1D]) -> None:
    queue = _C.WeightQueue()
    first = conv1d(HIDDEN, WIDTH) if transposed else nn.Linear(WIDTH, HIDDEN)
    model, reference = pair(nn.Sequential(first, nn.GELU(), nn.Linear(HIDDEN, WIDTH)))
    x = leaf(2, 3, WIDTH)
    y = twin(x)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        with queue.scope():
            output = model(x)
        wanted = reference(y)
    assert output.dtype == torch.bfloat16
    assert_equal(output, wanted)
    with backward_pass(queue):
        loss_of(output).backward()
    assert has_no_grads(model)
    queue.run(0, 0)
    loss_of(wanted).backward()
    assert_equal(x.grad, y.grad)
    assert_same_grads(model, reference)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_autocast_keeps_a_usable_weight_cache() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    with torch.autocast("cpu", torch.bfloat16):
        with queue.scope():
            layer(torch.randn(BATCH, WIDTH))
        output = F.linear(torch.randn(BATCH, WIDTH), layer.weight)
    loss_of(output).backward()
    assert layer.weight.grad is not None


def test_w_under_autocast_keeps_its_precision() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP())
    x = leaf(BATCH, WIDTH)
    split_step(queue, model, x)
    with torch.autocast("cpu", torch.bfloat16):
        queue.run(0, 0)
    plain_step(reference, twin(x))
    assert_same_grads(model, reference)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_activation_checkpointing(use_reentrant: bool, autocast: bool) -> None:
    queue = _C.WeightQueue()
    model, reference = pair(nn.Sequential(MLP(), nn.Dropout(0.3), MLP()))
    x = leaf(2, 3, WIDTH)
    y = twin(x)

    def run(block: nn.Module, t: Tensor) -> Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output: Tensor = checkpoint(block, t, use_reentrant=use_reentrant)
        return output

    with queue.scope():
        output = run(model, x)
    wanted = run(reference, y)
    assert_equal(output, wanted)
    with CountKernels() as in_i, backward_pass(queue):
        loss_of(output).backward()
    assert in_i.products == 8  # four computed again, four for the inputs
    assert has_no_grads(model)
    queue.run(0, 0)
    loss_of(wanted).backward()
    assert_equal(x.grad, y.grad)
    assert_same_grads(model, reference)


def test_saved_tensor_hooks() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP())
    x = leaf(BATCH, WIDTH)
    with torch.autograd.graph.save_on_cpu(), queue.scope():
        output = model(x)
    with backward_pass(queue):
        loss_of(output).backward()
    queue.run(0, 0)
    plain_step(reference, twin(x))
    assert_same_grads(model, reference)


def test_second_derivative_is_refused() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    x = leaf(BATCH, WIDTH)
    with queue.scope():
        loss = loss_of(layer(x))
    with pytest.raises(NotImplementedError, match=r"differentiated twice.*create_graph=False"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_compiled_model_is_left_to_the_compiler() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = leaf(BATCH, WIDTH)
    with queue.scope():
        output = compiled(x)
    assert_equal(output, reference(x))
    with backward_pass(queue):
        loss_of(output).backward()
    assert queue.num_pending == 0
    assert model.up.weight.grad is not None


@pytest.mark.parametrize("defer", [True, False])
def test_gradients_asked_for_alone_leave_the_weights_alone(defer: bool) -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP())
    x = leaf(BATCH, WIDTH)
    y = twin(x)
    with queue.scope():
        loss = loss_of(model(x))
    with backward_pass(queue, defer=defer):
        (found,) = torch.autograd.grad(loss, x, retain_graph=True)
    (wanted,) = torch.autograd.grad(loss_of(reference(y)), y)
    assert_equal(found, wanted)
    assert queue.num_pending == 0 and has_no_grads(model)
    with backward_pass(queue, defer=defer):
        loss.backward()
    queue.run(0, 0)
    plain_step(reference, y)
    assert_same_grads(model, reference)


def test_backward_for_some_inputs_accumulates_those_alone() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP())
    x = leaf(BATCH, WIDTH)
    y = twin(x)
    with queue.scope():
        loss = loss_of(model(x))
    with backward_pass(queue):
        loss.backward(inputs=[x, model.up.weight, model.down.bias])
    queue.run(0, 0)
    loss_of(reference(y)).backward(inputs=[y, reference.up.weight, reference.down.bias])
    assert_equal(x.grad, y.grad)
    assert model.up.weight.grad is not None and model.up.bias.grad is None
    assert_same_grads(model, reference)


def test_complex_weights_are_left_to_autograd() -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, HIDDEN, dtype=torch.complex64))
    x = leaf(BATCH, WIDTH, dtype=torch.complex64)
    with queue.scope():
        output = _C.deferred_linear(x, layer.weight, layer.bias)
    with backward_pass(queue):
        output.abs().sum().backward()
    assert queue.num_pending == 0
    reference(twin(x)).abs().sum().backward()
    assert_same_grads(layer, reference)
    assert [m.reason for m in weight_split(layer).modules] == ["its weight is complex"]
