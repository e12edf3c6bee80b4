"""Linear layers whose weight gradients wait for W: values, work done, memory kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from deferral import (
    BATCH,
    DTYPES,
    HIDDEN,
    MLP,
    WIDTH,
    CountKernels,
    assert_close_grads,
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

from dualpipe_ext import _C


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(WIDTH,), (BATCH, WIDTH), (2, 3, WIDTH), (2, 3, 4, WIDTH)])
def test_equals_autograd_bit_for_bit(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP(bias, dtype))
    x = leaf(*shape, dtype=dtype)
    y = twin(x)
    assert_equal(split_step(queue, model, x), plain_step(reference, y))
    assert has_no_grads(model)
    assert_equal(x.grad, y.grad)
    assert queue.num_pending == 2
    queue.run(0, 0)
    assert queue.num_pending == 0
    assert_same_grads(model, reference)


@pytest.mark.parametrize("defer", [True, False])
def test_microbatches_are_summed_in_place(defer: bool) -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP(dtype=torch.float64))
    sums = []
    for microbatch in range(4):
        x = leaf(BATCH, WIDTH, dtype=torch.float64)
        with queue.scope():
            output = model(x)
        with backward_pass(queue, defer=defer, microbatch=microbatch):
            loss_of(output).backward()
        queue.run(0, microbatch)
        plain_step(reference, twin(x))
        sums.append(model.up.weight.grad)
    assert all(grad is sums[0] for grad in sums)
    assert_close_grads(model, reference)


def test_w_of_a_microbatch_leaves_others_alone() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP(dtype=torch.float64))
    inputs = [leaf(BATCH, WIDTH, dtype=torch.float64) for _ in range(3)]
    with queue.scope():
        outputs = [model(x) for x in inputs]
    for microbatch, output in enumerate(outputs):
        with backward_pass(queue, microbatch=microbatch):
            loss_of(output).backward()
    assert queue.num_pending == 6
    queue.run(0, 1)
    assert queue.num_pending == 4
    plain_step(reference, twin(inputs[1]))
    assert_same_grads(model, reference)
    queue.run(0, 1)
    assert_same_grads(model, reference)


def test_tensors_that_are_not_contiguous() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP(dtype=torch.float64))
    x = torch.randn(WIDTH, 3, 2, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    y = twin(x)
    with queue.scope():
        output = model(x).transpose(0, 1)
    with backward_pass(queue):
        output.sum().backward()  # an output gradient without strides
    queue.run(0, 0)
    reference(y).transpose(0, 1).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    assert_close_grads(model, reference)


def test_gradient_has_the_strides_of_its_parameter() -> None:
    queue = _C.WeightQueue()
    layer = nn.Linear(WIDTH, HIDDEN, bias=False)
    layer.weight = nn.Parameter(torch.randn(WIDTH, HIDDEN).t())
    model, reference = pair(layer)
    x = leaf(BATCH, WIDTH)
    split_step(queue, model, x)
    queue.run(0, 0)
    plain_step(reference, twin(x))
    assert_same_grads(model, reference)


def test_batch_without_rows() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP())
    x = leaf(0, 3, WIDTH)
    split_step(queue, model, x)
    queue.run(0, 0)
    plain_step(reference, twin(x))
    assert_same_grads(model, reference)


@pytest.mark.parametrize("shape", [(BATCH, WIDTH), (2, 3, WIDTH)])
def test_output_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, HIDDEN))
    x = leaf(*shape)
    output = split_step(queue, lambda t: layer(t).relu_(), x)
    assert_equal(output, plain_step(lambda t: reference(t).relu_(), twin(x)))
    queue.run(0, 0)
    assert_same_grads(layer, reference)


def test_input_changed_after_the_forward_is_an_error() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    x = torch.randn(BATCH, WIDTH)
    with queue.scope():
        output = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_without_gradients_it_is_the_plain_layer() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP())
    x = torch.randn(BATCH, WIDTH)
    with queue.scope(), torch.no_grad():
        assert_equal(model(x), reference(x))
    with queue.scope(), torch.inference_mode():
        assert_equal(model(x), reference(x))


def test_no_product_is_computed_twice() -> None:
    queue = _C.WeightQueue()
    model, _ = pair(MLP())
    with queue.scope():
        loss = loss_of(model(leaf(BATCH, WIDTH)))
    with CountKernels() as in_i, backward_pass(queue):
        loss.backward()
    assert in_i.products == 2
    assert in_i.calls["sum"] == 0
    with CountKernels() as in_w:
        queue.run(0, 0)
    assert in_w.products == 2
    assert in_w.calls["sum"] == 2


def test_first_layer_has_nothing_to_do_in_i() -> None:
    queue = _C.WeightQueue()
    layer, reference = pair(nn.Linear(WIDTH, HIDDEN))
    x = torch.randn(BATCH, WIDTH)
    with queue.scope():
        loss = loss_of(layer(x))
    with CountKernels() as in_i, backward_pass(queue):
        loss.backward()
    assert in_i.products == 0
    queue.run(0, 0)
    plain_step(reference, x)
    assert_same_grads(layer, reference)


def test_later_microbatches_are_added_within_the_product() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN, bias=False))
    for microbatch in range(2):
        split_step(queue, layer, torch.randn(BATCH, WIDTH), microbatch=microbatch)
    queue.run(0, 0)
    with CountKernels() as in_w:
        queue.run(0, 1)
    assert in_w.calls["addmm_"] == 1
    assert in_w.calls["mm"] == in_w.calls["add_"] == 0


def test_input_is_kept_until_w_and_freed_by_it() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    freed: list[bool] = []
    memory = np.ones((BATCH, WIDTH), dtype=np.float32)
    weakref.finalize(memory, freed.append, True)
    x = torch.from_numpy(memory)
    split_step(queue, layer, x)
    del memory, x
    gc.collect()
    assert not freed
    queue.run(0, 0)
    gc.collect()
    assert freed


class Source(torch.autograd.Function):
    """Something to differentiate through whose node can be watched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_waiting_task_keeps_no_graph_alive() -> None:
    queue = _C.WeightQueue()
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    x = Source.apply(leaf(BATCH, WIDTH))  # type: ignore[no-untyped-call]
    node = weakref.ref(x.grad_fn)
    split_step(queue, layer, x)
    del x
    gc.collect()
    assert queue.num_pending == 1
    assert node() is None


def test_backward_outside_of_a_pass_is_done_at_once() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP())
    x = leaf(BATCH, WIDTH)
    with queue.scope():
        output = model(x)
    loss_of(output).backward()
    assert queue.num_pending == 0
    plain_step(reference, twin(x))
    assert_same_grads(model, reference)


def test_backward_after_the_queue_is_gone_is_done_at_once() -> None:
    model, reference = pair(MLP())
    x = leaf(BATCH, WIDTH)
    queue = _C.WeightQueue()
    with queue.scope():
        output = model(x)
    del queue
    loss_of(output).backward()
    plain_step(reference, twin(x))
    assert_same_grads(model, reference)


def test_weight_that_is_no_leaf_is_left_to_autograd() -> None:
    queue = _C.WeightQueue()
    weight = leaf(HIDDEN, WIDTH)
    with queue.scope():
        output = _C.deferred_linear(torch.randn(BATCH, WIDTH), weight * 2, None)
    with backward_pass(queue):
        loss_of(output).backward()
    assert queue.num_pending == 0
    assert weight.grad is not None
