"""Helpers of the tests of deferred weight gradients: F, I and W of a micro-batch by hand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dualpipe_ext import _C
from dualpipe_ext.weight_grad import defer_weight_gradients

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BATCH, WIDTH, HIDDEN = 6, 5, 7

M = TypeVar("M", bound=nn.Module)


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN, bias=bias, dtype=dtype)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(F.gelu(self.up(x)))
        return output


class Conv1D(nn.Module):
    """GPT-2's linear layer, with the interface that transformers gives it: weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(*x.size()[:-1], self.nf)


class Failure(Exception):
    """What a hook or a function of a test raises."""


class CountKernels(TorchDispatchMode):
    """Counts the kernels that run, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        """Matrix products."""
        return sum(self.calls[name] for name in ("mm", "addmm", "addmm_", "linear", "bmm"))


@contextmanager
def backward_pass(
    queue: _C.WeightQueue, *, defer: bool = True, microbatch: int = 0
) -> Iterator[None]:
    """What the engine puts around a backward pass of stage 0: I, or B without ``defer``."""
    queue.begin_backward(0, microbatch, defer)
    try:
        with queue.scope():
            yield
    finally:
        queue.end_backward()


def loss_of(output: Tensor) -> Tensor:
    return (output.float() if output.dtype == torch.bfloat16 else output).square().sum()


def split_step(
    queue: _C.WeightQueue, model: Callable[[Tensor], Tensor], x: Tensor, *, microbatch: int = 0
) -> Tensor:
    """F and I of a micro-batch; returns the output."""
    with queue.scope():
        output = model(x)
    with backward_pass(queue, microbatch=microbatch):
        loss_of(output).backward()
    return output.detach()


def plain_step(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The same by autograd; returns the output."""
    output = model(x)
    loss_of(output).backward()
    return output.detach()


def pair(model: M) -> tuple[M, M]:
    """The model, which defers from now on, and a copy that does not."""
    reference = copy.deepcopy(model)
    defer_weight_gradients(model)
    return model, reference


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def twin(tensor: Tensor) -> Tensor:
    """A leaf of the same values, strides and need of a gradient."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def has_no_grads(model: nn.Module) -> bool:
    return all(parameter.grad is None for parameter in model.parameters())


def assert_equal(a: Tensor | None, b: Tensor | None, name: str = "") -> None:
    """Bit for bit, with type and strides; or both absent."""
    assert (a is None) == (b is None), name
    if a is not None and b is not None:
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), name
        assert torch.equal(a, b), f"{name} differs by {(a - b).abs().max()}"


def assert_same_grads(model: nn.Module, reference: nn.Module) -> None:
    """Bit for bit."""
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, wanted[name].grad, name)


def assert_close_grads(model: nn.Module, reference: nn.Module) -> None:
    """Up to the rounding of float64 sums in another order."""
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-12, atol=1e-12)
