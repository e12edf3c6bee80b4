"""The protocol for backward functions that defer their weight gradients themselves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deferral import (
    BATCH,
    HIDDEN,
    WIDTH,
    Failure,
    assert_close_grads,
    backward_pass,
    leaf,
    loss_of,
    plain_step,
    split_step,
    twin,
)
from torch import Tensor, nn

from dualpipe_ext import _C
from dualpipe_ext.utils import WeightGradStore, run_backward


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    WeightGradStore.enabled = False
    WeightGradStore.clear()


class StoreLinear(torch.autograd.Function):
    """A linear operation that hands its weight gradient to the store."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors

        def add_weight_grad() -> None:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad += grad.T @ x

        if WeightGradStore.enabled:
            WeightGradStore.put(add_weight_grad)
        else:
            add_weight_grad()
        return grad @ weight, None


class StoreModule(nn.Module):
    """A layer made of it; ``plain``: the same by autograd."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.plain = plain
        self.weight = nn.Parameter(torch.randn(HIDDEN, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return F.linear(x, self.weight)
        output: Tensor = StoreLinear.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return output


def batch() -> Tensor:
    return leaf(BATCH, WIDTH, dtype=torch.float64)


def test_engine_defers_what_is_put() -> None:
    queue = _C.WeightQueue()
    module, reference = StoreModule(), StoreModule(plain=True)
    inputs = [batch() for _ in range(2)]
    for microbatch, x in enumerate(inputs):
        split_step(queue, module, x, microbatch=microbatch)
    assert module.weight.grad is None
    assert queue.num_pending == 2
    for microbatch, x in enumerate(inputs):
        queue.run(0, microbatch)
        plain_step(reference, twin(x))
    assert_close_grads(module, reference)
    assert module.weight.grad is not None and not module.weight.grad.requires_grad


def test_enabled_is_true_in_i_alone() -> None:
    queue = _C.WeightQueue()
    assert not WeightGradStore.enabled
    with queue.scope():
        assert not WeightGradStore.enabled
    with backward_pass(queue, defer=False):
        assert not WeightGradStore.enabled
    with backward_pass(queue, defer=True):
        assert WeightGradStore.enabled
    assert not WeightGradStore.enabled


def test_put_in_a_pass_that_does_not_defer_is_a_call() -> None:
    queue = _C.WeightQueue()
    calls: list[bool] = []
    with backward_pass(queue, defer=False):
        WeightGradStore.put(lambda: calls.append(torch.is_grad_enabled()))
    assert calls == [False]
    assert queue.num_pending == 0


def test_two_engines_in_one_thread_stay_apart() -> None:
    first, second = _C.WeightQueue(), _C.WeightQueue()
    calls: list[str] = []
    with backward_pass(first):
        WeightGradStore.put(lambda: calls.append("first"))
    with backward_pass(second):
        WeightGradStore.put(lambda: calls.append("second"))
    assert (first.num_pending, second.num_pending) == (1, 1)
    second.run(0, 0)
    assert calls == ["second"]


def test_without_an_engine_groups_are_flushed_and_popped() -> None:
    module, reference = StoreModule(), StoreModule(plain=True)
    inputs = [batch() for _ in range(2)]
    WeightGradStore.enabled = True
    for x in inputs:
        loss_of(module(x)).backward()
        WeightGradStore.flush()
    WeightGradStore.enabled = False
    assert module.weight.grad is None
    for x in inputs:
        WeightGradStore.pop()
        plain_step(reference, twin(x))
        assert_close_grads(module, reference)
    with pytest.raises(ValueError, match="call flush once before each pop"):
        WeightGradStore.pop()


def test_an_empty_group_is_a_group() -> None:
    WeightGradStore.flush()
    WeightGradStore.pop()
    with pytest.raises(ValueError, match="no group"):
        WeightGradStore.pop()


def test_clear_forgets_functions_and_groups() -> None:
    calls: list[int] = []
    WeightGradStore.put(lambda: calls.append(1))
    WeightGradStore.flush()
    WeightGradStore.put(lambda: calls.append(2))
    WeightGradStore.clear()
    WeightGradStore.flush()
    WeightGradStore.pop()
    assert calls == []


def test_threads_have_stores_of_their_own() -> None:
    WeightGradStore.enabled = True
    WeightGradStore.put(lambda: None)
    WeightGradStore.flush()

    def look() -> bool:
        with pytest.raises(ValueError, match="no group"):
            WeightGradStore.pop()
        return WeightGradStore.enabled

    with ThreadPoolExecutor(1) as thread:
        assert not thread.submit(look).result()
    assert WeightGradStore.enabled
    WeightGradStore.pop()


def test_what_a_function_raises_is_raised_by_pop() -> None:
    def fail() -> None:
        raise Failure("the function's own words")

    WeightGradStore.put(fail)
    WeightGradStore.flush()
    with pytest.raises(Failure, match="the function's own words"):
        WeightGradStore.pop()


def test_put_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="was given a Tensor; give it a function"):
        WeightGradStore.put(torch.zeros(1))  # type: ignore[arg-type]


def test_run_backward_passes_over_what_needs_no_gradient() -> None:
    x = leaf(3)
    run_backward([x * 2, None, torch.ones(2), x * 3], [torch.ones(3), None, torch.ones(2), None])
    assert x.grad is not None and x.grad.tolist() == [2, 2, 2]
    run_backward([], [])


def test_run_backward_wants_a_gradient_for_each_tensor() -> None:
    with pytest.raises(ValueError, match="2 tensors and 1 gradients"):
        run_backward([leaf(1), leaf(1)], [torch.ones(1)])
