"""Gradients of several batches as the gradient of one batch made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Accumulation"]


class Accumulation:
    """Counts the batches until a step of the optimizer, and what they weigh.

    Gradients are kept as those of the mean over all units so far: a new batch scales down what is
    there, instead of everything being divided at the end, where float16 would have overflown.

    Args:
        num_steps: batches between two steps of the optimizer.
        is_mean: whether the loss is a mean over units; otherwise batches just add up.
    """

    def __init__(self, num_steps: int, is_mean: bool) -> None:
        self._num_steps = num_steps
        self._is_mean = is_mean
        self._num_batches = 0
        self._units = 0
        self._loss = 0.0

    @property
    def num_batches(self) -> int:
        """Added since the last step of the optimizer."""
        return self._num_batches

    @property
    def is_complete(self) -> bool:
        """Whether the last batch that was added is the last one before the optimizer's step."""
        return self._num_batches >= self._num_steps

    def add(self, units: int, grads: Sequence[Tensor]) -> int:
        """Makes room for a batch of so many units; returns what to divide its own units by."""
        total = self._units + units
        if self._is_mean and self._units and grads:
            torch._foreach_mul_(list(grads), self._units / total)
        self._num_batches += 1
        self._units = total
        return total

    def add_loss(self, loss: float, units: int) -> float:
        """Takes the loss of the batch that was just added; returns that of all of them as one."""
        self._loss += loss * units if self._is_mean else loss
        if self._num_batches == 1 or not self._is_mean:
            return loss if self._num_batches == 1 else self._loss
        return self._loss / self._units

    def restart(self) -> None:
        """Begins with the next batch."""
        self._num_batches = self._units = 0
        self._loss = 0.0
