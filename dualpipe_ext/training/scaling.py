"""Gradient scaling for float16: either all ranks skip a step, or none does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

__all__ = ["RankScaler", "are_finite", "refuse_main_grads"]


class RankScaler:
    """A ``GradScaler`` of one rank that takes into account what the others found.

    Args:
        scaler: made alike on every rank; its scale then stays the same on all of them.
        device: the device of this rank's stages.

    Attributes:
        scaler: the scaler that was given.
    """

    def __init__(self, scaler: GradScaler, device: torch.device) -> None:
        self.scaler = scaler
        self.scale(torch.zeros((), device=device))  # ranks without losses need its state as well

    def scale(self, loss: Tensor, _microbatch: int = 0) -> Tensor:
        """Returns the scaled loss, which is the one to differentiate."""
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: Optimizer, are_finite: bool) -> None:
        """Removes the scale from gradients.

        Args:
            optimizer: the optimizer whose gradients to unscale.
            are_finite: whether the gradients of all ranks are finite. If not, one of this
                optimizer's is made infinite, so that the scaler finds the same on every rank.

        Raises:
            ValueError: a gradient is in a ``main_grad``.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        refuse_main_grads(parameters)
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:  # everything here is frozen, but the scaler requires a gradient
            parameters[0].grad = torch.zeros_like(parameters[0])
            grads = [parameters[0].grad]
        if not are_finite:
            grads[0].fill_(float("inf"))
        self.scaler.unscale_(optimizer)

    def reset(self) -> None:
        """Forgets that gradients were unscaled, in case an update failed after that."""
        self.scaler._per_optimizer_states.clear()

    def step(self, optimizer: Optimizer) -> None:
        """Steps the optimizer unless a gradient is not finite; updates the scale in either case."""
        self.scaler.step(optimizer)
        self.scaler.update()


def refuse_main_grads(parameters: Iterable[Tensor]) -> None:
    """Raises ValueError if a gradient is in a ``main_grad``, where a GradScaler never looks."""
    if any(getattr(parameter, "main_grad", None) is not None for parameter in parameters):
        raise ValueError(
            "a GradScaler does not unscale main_grad: train without scaler=, in bfloat16, or without "
            "main_grad"
        )


def are_finite(grads: Sequence[Tensor]) -> bool:
    """Whether no element of the gradients is infinite or NaN."""
    if not grads:
        return True
    return bool(torch.stack([grad.isfinite().all().cpu() for grad in grads]).all())
