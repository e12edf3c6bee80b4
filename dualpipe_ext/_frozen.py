"""Detects training steps that train nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from dualpipe_ext._advice import warn_caller
from dualpipe_ext._step import Criterion

__all__ = ["FrozenWatch"]


class FrozenWatch:
    """Warns if the first loss of a training step depends on no trainable parameter of any stage.

    What a stage receives requires a gradient if what was sent does, so a loss depends visibly on
    the stages of all ranks. (A loss that was detached from them is an error raised by
    :class:`Step`.)

    Args:
        is_told: whether this rank is the one that warns.
    """

    def __init__(self, *, is_told: bool) -> None:
        self._is_told = is_told

    def watching(self, criterion: Criterion) -> Criterion:
        """Returns the same criterion, with a check of its first loss in training."""
        if not self._is_told or not torch.is_grad_enabled():
            return criterion

        def watched(*outputs_and_labels: Tensor) -> Tensor:
            loss = criterion(*outputs_and_labels)
            if self._is_told:
                self._is_told = False
                found = (*outputs_and_labels, loss)
                if not any(isinstance(x, Tensor) and x.requires_grad for x in found):
                    self._warn()
            return loss

        return watched

    @staticmethod
    def _warn() -> None:
        warn_caller(
            "nothing is trained: the loss depends on no parameter that requires a gradient, of no "
            "stage; call requires_grad_(True) on those that are to learn before the pipeline is "
            "made, or evaluate under torch.no_grad()"
        )
