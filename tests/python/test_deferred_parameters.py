"""Parameters of deferred layers that are frozen, shared, watched by hooks, or have a main_grad."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from deferral import (
    BATCH,
    HIDDEN,
    MLP,
    WIDTH,
    Failure,
    assert_close_grads,
    assert_equal,
    assert_same_grads,
    backward_pass,
    leaf,
    loss_of,
    pair,
    plain_step,
    split_step,
    twin,
)
from torch import Tensor, nn

from dualpipe_ext import _C
from dualpipe_ext.weight_grad import defer_weight_gradients


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_frozen_weight_saves_no_input() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP())
    for each in (model, reference):
        each.up.weight.requires_grad_(False)
        each.down.bias.requires_grad_(False)
    x = leaf(BATCH, WIDTH)
    y = twin(x)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t), queue.scope():
        model.up(x)
    assert [tuple(t.shape) for t in saved] == [(HIDDEN, WIDTH)]
    split_step(queue, model, x)
    queue.run(0, 0)
    plain_step(reference, y)
    assert_equal(x.grad, y.grad)
    assert_same_grads(model, reference)


def test_everything_frozen() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP().requires_grad_(False))
    x = leaf(BATCH, WIDTH)
    y = twin(x)
    split_step(queue, model, x)
    assert queue.num_pending == 0
    plain_step(reference, y)
    assert_equal(x.grad, y.grad)
    with queue.scope():
        assert not model(x.detach()).requires_grad


def test_layer_used_twice_in_a_microbatch() -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, WIDTH, dtype=torch.float64))
    x = leaf(BATCH, WIDTH, dtype=torch.float64)
    split_step(queue, lambda t: layer(F.gelu(layer(t))), x)
    queue.run(0, 0)
    plain_step(lambda t: reference(F.gelu(reference(t))), twin(x))
    assert_close_grads(layer, reference)


class TiedModel(nn.Module):
    """An embedding whose weight is the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(HIDDEN, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(F.gelu(self.embedding(tokens)))
        return logits


def test_weight_tied_to_an_embedding() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(TiedModel())
    assert model.embedding.weight is model.head.weight
    tokens = torch.arange(HIDDEN)
    split_step(queue, model, tokens)
    queue.run(0, 0)
    plain_step(reference, tokens)
    assert_close_grads(model, reference)


@pytest.mark.parametrize("defer", [True, False])
def test_post_accumulate_hook_is_called_once_with_the_whole_gradient(defer: bool) -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, WIDTH, dtype=torch.float64))
    seen: list[Tensor | None] = []
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    x = leaf(BATCH, WIDTH, dtype=torch.float64)
    with queue.scope():
        output = layer(F.gelu(layer(x)))
    with backward_pass(queue, defer=defer):
        loss_of(output).backward()
    assert len(seen) == (0 if defer else 1)
    queue.run(0, 0)
    assert len(seen) == 1
    plain_step(lambda t: reference(F.gelu(reference(t))), twin(x))
    torch.testing.assert_close(seen[0], reference.weight.grad, rtol=1e-12, atol=1e-12)


def test_tensor_hook_sees_each_microbatch_and_changes_its_gradient() -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, HIDDEN, dtype=torch.float64))
    for each in (layer, reference):
        each.weight.register_hook(lambda grad: 2 * grad)
        each.bias.register_hook(lambda grad: grad.clamp(max=0.1))
    inputs = [leaf(BATCH, WIDTH, dtype=torch.float64) for _ in range(3)]
    for microbatch, x in enumerate(inputs):
        split_step(queue, layer, x, microbatch=microbatch)
    for microbatch, x in enumerate(inputs):
        queue.run(0, microbatch)
        plain_step(reference, twin(x))
    assert_same_grads(layer, reference)


def test_hook_of_the_gradient_accumulator() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    node = torch.autograd.graph.get_gradient_edge(layer.weight).node
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
    calls: list[Tensor] = []
    layer.weight.register_post_accumulate_grad_hook(calls.append)
    queue.run(0, 0)
    assert len(calls) == 1


@pytest.mark.parametrize("defer", [True, False])
def test_what_a_hook_raises_is_raised_by_w(defer: bool) -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, HIDDEN))

    def fail(parameter: Tensor) -> None:
        raise Failure("the hook's own words")

    handle = layer.weight.register_post_accumulate_grad_hook(fail)
    with queue.scope():
        loss = loss_of(layer(leaf(BATCH, WIDTH)))
    with pytest.raises(Failure, match="the hook's own words"):
        with backward_pass(queue, defer=defer):
            loss.backward()
        queue.run(0, 0)
    assert queue.num_pending == 0
    handle.remove()
    layer.zero_grad()
    x = leaf(BATCH, WIDTH)
    split_step(queue, layer, x)
    queue.run(0, 0)
    plain_step(reference, twin(x))
    assert_same_grads(layer, reference)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_is_used_instead_of_grad(dtype: torch.dtype, hooked: bool) -> None:
    queue = _C.WeightQueue()
    layer = nn.Linear(WIDTH, HIDDEN, dtype=dtype)
    reference = copy.deepcopy(layer)
    defer_weight_gradients(layer)
    calls: list[Tensor] = []
    sums = {name: torch.zeros(p.shape) for name, p in layer.named_parameters()}
    wanted = {name: torch.zeros(p.shape) for name, p in layer.named_parameters()}
    sizes = {name: torch.zeros(p.shape) for name, p in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        parameter.main_grad = sums[name]  # type: ignore[attr-defined]
        if hooked:
            parameter.register_post_accumulate_grad_hook(calls.append)
    for microbatch in range(3):
        x = torch.randn(BATCH, WIDTH, dtype=dtype)
        split_step(queue, layer, x, microbatch=microbatch)
        queue.run(0, microbatch)
        reference.zero_grad()
        plain_step(reference, x)
        for name, parameter in reference.named_parameters():
            assert parameter.grad is not None
            wanted[name] += parameter.grad
            sizes[name] += parameter.grad.abs()
    assert len(calls) == (6 if hooked else 0)
    assert all(parameter.grad is None for parameter in layer.parameters())
    # bfloat16: autograd rounds every gradient to 8 bits, which main_grad is there to avoid
    rounding = 1e-6 if dtype == torch.float32 or hooked else 2**-8
    for name, total in sums.items():
        assert ((total - wanted[name]).abs() <= rounding * (sizes[name] + 1)).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_main_grad_gets_products_that_were_not_rounded(dtype: torch.dtype) -> None:
    """Sums of bfloat16 gradients in float32 are those of the unrounded ones."""
    queue = _C.WeightQueue()
    layer = nn.Linear(WIDTH, HIDDEN, bias=False, dtype=dtype)
    defer_weight_gradients(layer)
    total = torch.zeros(layer.weight.shape)
    layer.weight.main_grad = total  # type: ignore[attr-defined]
    exact = torch.zeros(layer.weight.shape)
    for microbatch in range(3):
        x = torch.randn(BATCH, WIDTH, dtype=dtype)
        with queue.scope():
            output = layer(x)
        with backward_pass(queue, microbatch=microbatch):
            output.sum().backward()
        queue.run(0, microbatch)
        exact += torch.ones(HIDDEN, BATCH) @ x.float()
    torch.testing.assert_close(total, exact, rtol=1e-6, atol=1e-6)
    assert not torch.equal(total, total.to(dtype).float())
