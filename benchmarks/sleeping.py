"""Stages that sleep instead of computing: what a step takes beyond its makespan is the engine's.

``time.sleep(0.010)`` takes 10.1 ms, because timers are late and threads wake up slowly. That is due
to the machine, not to an engine: the delay is measured, and subtracted from every sleep.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SleepTimes:
    """Seconds for a forward and for the two halves of a backward."""

    forward: float = 0.010
    backward_input: float = 0.010
    backward_weight: float = 0.010


class Results(Protocol):
    """Makes the outputs and input gradients of a stage."""

    def output(self, x: Tensor) -> Tensor:
        """Returns an output like the input ``x``."""

    def input_grad(self, output_grad: Tensor) -> Tensor:
        """Returns an input gradient like the output's."""


class FreshResults:
    """Outputs in memory of their own; gradients are passed through."""

    def output(self, x: Tensor) -> Tensor:
        """Returns new memory."""
        return torch.empty_like(x)

    def input_grad(self, output_grad: Tensor) -> Tensor:
        """Returns what was given."""
        return output_grad


class ReusedResults:
    """One buffer per shape, so that a stage costs a device nothing, however large its messages."""

    def __init__(self) -> None:
        self._buffers: dict[torch.Size, Tensor] = {}

    def output(self, x: Tensor) -> Tensor:
        """Returns the buffer of that shape."""
        if x.shape not in self._buffers:
            self._buffers[x.shape] = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        return self._buffers[x.shape].detach()

    input_grad = output


class _Sleep(torch.autograd.Function):
    """Sleeps in forward and backward; leaves the sleep of W to the store if that is enabled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stage: "SleepStage") -> Tensor:
        ctx.stage = stage
        stage.sleep(stage.times.forward)
        return stage.results.output(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        stage: SleepStage = ctx.stage
        stage.sleep(stage.times.backward_input)
        if stage.store is not None and stage.store.enabled:
            stage.store.put(stage.sleep_weight)
        elif not stage.weight_runs_apart:
            stage.sleep_weight()
        return stage.results.input_grad(grads[0]), None, None


class SleepStage(nn.Module):
    """A stage whose actions take a given time and whose messages have the shape of its input.

    Args:
        times: how many seconds each kind of action takes.
        store: the ``WeightGradStore`` of the engine that runs it, if it has one.
        weight_runs_apart: whether the engine runs ``sleep_weight`` itself (torch's ``dw_builder``).
        sleep: sleeps a number of seconds.
        results: makes outputs and input gradients.
    """

    def __init__(
        self,
        times: SleepTimes,
        store: Any = None,
        *,
        weight_runs_apart: bool = False,
        sleep: Callable[[float], None] | None = None,
        results: Results | None = None,
    ) -> None:
        super().__init__()
        self.times = times
        self.store = store
        self.weight_runs_apart = weight_runs_apart
        self.sleep = sleep or host_sleep
        self.results = results or FreshResults()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Sleeps, and returns a tensor like ``x``."""
        return _Sleep.apply(x, self.weight, self)  # type: ignore[no-any-return,no-untyped-call]

    def sleep_weight(self) -> None:
        """Sleeps as long as the weight gradients take."""
        self.sleep(self.times.backward_weight)

    def weight_runner(self) -> Callable[..., None]:
        """Returns what runs the weight gradients of the backward that just ran."""
        return self.sleep_weight


def first_element(output: Tensor, *labels: Tensor) -> Tensor:
    """Returns a loss that costs almost nothing."""
    return output.flatten()[0].clone()


class _FreeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.shape = output.shape
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].expand(ctx.shape)


def free_loss(output: Tensor, *labels: Tensor) -> Tensor:
    """Returns a loss that costs a device nothing, however large the output."""
    return _FreeLoss.apply(output)  # type: ignore[no-any-return,no-untyped-call]


@functools.cache
def oversleep(seconds: float = 0.010, tries: int = 30) -> float:
    """Returns the median delay of a sleep on this machine."""
    late = []
    for _ in range(tries):
        start = time.perf_counter()
        time.sleep(seconds)
        late.append(time.perf_counter() - start - seconds)
    return statistics.median(late)


def host_sleep(seconds: float) -> None:
    """Sleeps as precisely as the machine can."""
    if seconds > 0:
        time.sleep(seconds - min(oversleep(), 0.1 * seconds))
