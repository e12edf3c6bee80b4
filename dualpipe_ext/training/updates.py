"""Updates parameters by their gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualpipe_ext.gradients import gradients_of, main_grads
from dualpipe_ext.pipeline import Pipeline
from dualpipe_ext.training.optimizers import (
    Recipe,
    make_optimizer,
    make_scheduler,
    step_scheduler,
)
from dualpipe_ext.training.scaling import RankScaler, are_finite, refuse_main_grads

__all__ = ["Updater", "make_updater"]

Act = Callable[[], None]


class Updater:
    """Clips and zeroes gradients, and steps optimizer and scheduler, alike on every rank.

    Attributes:
        optimizer: the optimizer of this rank's parameters.
        scheduler: the scheduler of the optimizer, if there is one.
        grad_norm: the norm of the whole model's gradient before it was last clipped.
        num_updates: the number of optimizer steps so far, without those that a scaler skipped.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        scaler: RankScaler | None,
        max_grad_norm: float | None,
    ) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.grad_norm: Tensor | None = None
        self.num_updates = 0
        self._pipeline = pipeline
        self._scaler = scaler
        self._max_grad_norm = max_grad_norm

    @property
    def scaler(self) -> GradScaler | None:
        """The loss scaler."""
        return None if self._scaler is None else self._scaler.scaler

    def grads(self) -> list[Tensor]:
        """Returns all gradients of this rank."""
        return gradients_of(self._pipeline.parameters())

    def can_step(self) -> bool:
        """Whether this rank's gradients allow a step; with a scaler, they must be finite."""
        return self._scaler is None or are_finite(self.grads())

    def run(self, loss: float, are_finite: bool, together: Callable[[Act], None]) -> None:
        """Takes a step, unless there is a scaler and the gradients of some rank are not finite.

        Args:
            loss: the loss of the batch, for a scheduler that depends on it.
            are_finite: whether :meth:`can_step` is true on all ranks.
            together: calls a function on every rank, and raises on all of them if it fails on any.
        """
        if self._scaler is not None:
            together(partial(self._scaler.unscale, self.optimizer, are_finite))
        if self._max_grad_norm is not None:
            self.grad_norm = self._pipeline.clip_grad_norm_(self._max_grad_norm)
        together(partial(self._step, loss, are_finite))

    def _step(self, loss: float, are_finite: bool) -> None:
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
        if are_finite:
            self.num_updates += 1
            step_scheduler(self.scheduler, loss)
        self.discard()

    def discard(self) -> None:
        """Discards all gradients, and what the scaler knows of them."""
        if self._scaler is not None:
            self._scaler.reset()
        self.optimizer.zero_grad()
        self._pipeline.zero_grad()  # those of parameters that the optimizer does not have
        for main_grad in main_grads(self._pipeline.parameters()):
            main_grad.zero_()


def make_updater(
    pipeline: Pipeline,
    device: torch.device,
    optimizer: Recipe,
    scheduler: Recipe,
    scaler: GradScaler | None,
    max_grad_norm: float | None,
) -> Updater:
    """Makes the updater of a rank's parameters; with a scaler, the pipeline scales losses from now.

    Args:
        pipeline: the pipeline with the parameters.
        device: the device of the rank's stages.
        optimizer: as for :func:`make_optimizer`.
        scheduler: as for :func:`make_scheduler`.
        scaler: the loss scaler, which is used if it is enabled; not for a ``main_grad``.
        max_grad_norm: the norm to which gradients of the whole model are clipped.

    Raises:
        ValueError, TypeError: as those functions do.
    """
    made = make_optimizer(optimizer, list(pipeline.parameters()), device)
    scaling = RankScaler(scaler, device) if scaler and scaler.is_enabled() else None
    if scaling is not None:
        refuse_main_grads(pipeline.parameters())
        pipeline.register_before_backward_hook(scaling.scale)
    return Updater(pipeline, made, make_scheduler(scheduler, made), scaling, max_grad_norm)
