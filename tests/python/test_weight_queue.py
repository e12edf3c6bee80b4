"""Queues of weight gradients: scopes, threads, failures."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from deferral import (
    BATCH,
    MLP,
    WIDTH,
    Failure,
    assert_close_grads,
    assert_same_grads,
    backward_pass,
    has_no_grads,
    leaf,
    pair,
    plain_step,
    split_step,
    twin,
)
from torch import Tensor

from dualpipe_ext import _C


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_two_threads_with_a_queue_each() -> None:
    num_steps = 50
    models = [pair(MLP(dtype=torch.float64)) for _ in range(2)]
    inputs = [torch.randn(num_steps, BATCH, WIDTH, dtype=torch.float64) for _ in range(2)]
    barrier = Barrier(2)

    def work(rank: int) -> None:
        queue = _C.WeightQueue()
        barrier.wait()
        for step in range(num_steps):
            split_step(queue, models[rank][0], inputs[rank][step], microbatch=step)
            queue.run(0, step)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))
    for (model, reference), data in zip(models, inputs, strict=True):
        for x in data:
            plain_step(reference, x)
        assert_close_grads(model, reference)


def test_scopes_nest_and_belong_to_their_thread() -> None:
    outer, inner = _C.WeightQueue(), _C.WeightQueue()
    assert _C.current_weight_queue() is None
    with outer.scope():
        with inner.scope():
            assert _C.current_weight_queue() is inner
        assert _C.current_weight_queue() is outer
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(_C.current_weight_queue).result() is None
    assert _C.current_weight_queue() is None


class Look(torch.autograd.Function):
    """Notes the current queue in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[object]) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(_C.current_weight_queue())
        return grad, None


def test_scope_reaches_functions_that_autograd_calls() -> None:
    queue = _C.WeightQueue()
    seen: list[object] = []
    output = Look.apply(leaf(2), seen)  # type: ignore[no-untyped-call]
    with backward_pass(queue):
        output.sum().backward()
    assert seen == [queue]


def test_functions_are_called_in_order_without_gradients() -> None:
    queue = _C.WeightQueue()
    calls: list[tuple[int, bool]] = []

    def note(number: int) -> None:
        calls.append((number, torch.is_grad_enabled()))

    with backward_pass(queue):
        for number in range(3):
            queue.put(lambda number=number: note(number))
    queue.run(0, 0)
    assert calls == [(0, False), (1, False), (2, False)]
    assert torch.is_grad_enabled()


def test_put_is_refused_where_nothing_is_deferred() -> None:
    queue = _C.WeightQueue()
    with pytest.raises(_C.InternalError, match="outside of a backward pass for inputs"):
        queue.put(lambda: None)


def test_w_without_tasks_does_nothing() -> None:
    queue = _C.WeightQueue()
    queue.run(3, 5)
    assert queue.num_pending == 0


def test_what_a_function_raises_is_raised_by_w() -> None:
    queue = _C.WeightQueue()
    calls: list[str] = []

    def fail() -> None:
        raise Failure("the function's own words")

    with backward_pass(queue):
        queue.put(lambda: calls.append("before"))
        queue.put(fail)
        queue.put(lambda: calls.append("after"))
    with pytest.raises(Failure, match="the function's own words"):
        queue.run(0, 0)
    assert calls == ["before"]
    assert queue.num_pending == 0


def test_clear_forgets_what_a_failed_step_left() -> None:
    queue = _C.WeightQueue()
    model, reference = pair(MLP())
    split_step(queue, model, leaf(BATCH, WIDTH))
    queue.begin_backward(0, 1, True)
    queue.clear()
    assert queue.num_pending == 0 and not queue.deferring
    queue.run(0, 0)
    assert has_no_grads(model)
    x = leaf(BATCH, WIDTH)
    split_step(queue, model, x)
    queue.run(0, 0)
    plain_step(reference, twin(x))
    assert_same_grads(model, reference)


class Nested(torch.autograd.Function):
    """Runs a backward pass within its backward, ``depth`` times over; then looks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, seen: list[object]) -> Tensor:
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.depth == 0:
            ctx.seen.append((threading.get_ident(), _C.current_weight_queue()))
        else:
            with torch.enable_grad():
                inner = Nested.apply(leaf(2), ctx.depth - 1, ctx.seen)  # type: ignore[no-untyped-call]
                inner.sum().backward()
        return grad, None, None


def test_scope_reaches_other_threads_of_autograd() -> None:
    queue = _C.WeightQueue()
    seen: list[tuple[int, object]] = []
    # At a depth of 60 torch hands nested passes to threads of its own.
    output = Nested.apply(leaf(2), 70, seen)  # type: ignore[no-untyped-call]
    with backward_pass(queue):
        output.sum().backward()
    ((thread, found),) = seen
    assert thread != threading.get_ident()
    assert found is queue
