"""Accumulates the gradients of several batches as the gradient of one batch made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Accumulation"]


class Accumulation:
    """Counts the batches until an optimizer step, and their units (rows or tokens).

    Gradients are kept as those of the mean over all units so far: each batch scales down what is
    there. If everything were divided at the end instead, float16 could overflow before that.

    Args:
        num_steps: the number of batches per optimizer step.
        is_mean: whether the loss is a mean over units; otherwise batches are just summed.
    """

    def __init__(self, num_steps: int, is_mean: bool) -> None:
        self._num_steps = num_steps
        self._is_mean = is_mean
        self._num_batches = 0
        self._units = 0
        self._loss = 0.0

    @property
    def num_batches(self) -> int:
        """The number of batches added since the last optimizer step."""
        return self._num_batches

    @property
    def is_complete(self) -> bool:
        """Whether the batch added last is the last one before an optimizer step."""
        return self._num_batches >= self._num_steps

    def add(self, units: int, grads: Sequence[Tensor]) -> int:
        """Scales gradients for a new batch of ``units``; returns what to divide its units by."""
        total = self._units + units
        if self._is_mean and self._units and grads:
            torch._foreach_mul_(list(grads), self._units / total)
        self._num_batches += 1
        self._units = total
        return total

    def add_loss(self, loss: float, units: int) -> float:
        """Adds the loss of the batch added last; returns the loss of all batches as one."""
        self._loss += loss * units if self._is_mean else loss
        if self._num_batches == 1 or not self._is_mean:
            return loss if self._num_batches == 1 else self._loss
        return self._loss / self._units

    def restart(self) -> None:
        """Starts over: the next batch is the first one."""
        self._num_batches = self._units = 0
        self._loss = 0.0
