"""Models whose layers take a known time, and no core while they do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext import WeightGradStore


class Slow(torch.autograd.Function):
    """Takes the same time forward, backward for inputs, and backward for weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        time.sleep(ctx.seconds)
        if WeightGradStore.enabled:
            WeightGradStore.put(lambda: time.sleep(ctx.seconds))
        else:
            time.sleep(ctx.seconds)
        return grads[0], grads[0].sum(), None


class SlowBlock(nn.Module):
    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds = 1e-3 * milliseconds

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Slow.apply(x, self.weight, self.seconds)  # type: ignore[no-untyped-call]
        return y


def slow_model(milliseconds: Sequence[float]) -> nn.Module:
    return nn.Sequential(*(SlowBlock(m) for m in milliseconds))
