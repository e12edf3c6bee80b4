"""Gradient scaling for float16: all ranks skip a step, or none does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

__all__ = ["RankScaler", "are_finite"]


class RankScaler:
    """A ``GradScaler`` of one rank, which is told what the others found.

    Args:
        scaler: made alike on every rank; its scale then stays the same on all of them.
        device: where this rank's stages are.

    Attributes:
        scaler: the same.
    """

    def __init__(self, scaler: GradScaler, device: torch.device) -> None:
        self.scaler = scaler
        self.scale(torch.zeros((), device=device))  # ranks without losses need its state as well

    def scale(self, loss: Tensor, _microbatch: int = 0) -> Tensor:
        """The loss to differentiate."""
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: Optimizer, are_finite: bool) -> None:
        """Takes the scale out of gradients.

        Args:
            optimizer: of the gradients.
            are_finite: whether those of all ranks are. If not, this optimizer gets one that is not,
                so that the scaler finds the same on every rank.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:  # all is frozen here: the scaler asks for a gradient nevertheless
            parameters[0].grad = torch.zeros_like(parameters[0])
            grads = [parameters[0].grad]
        if not are_finite:
            grads[0].fill_(float("inf"))
        self.scaler.unscale_(optimizer)

    def reset(self) -> None:
        """Forgets what an update that has failed has left: that gradients were unscaled."""
        self.scaler._per_optimizer_states.clear()

    def step(self, optimizer: Optimizer) -> None:
        """A step of the optimizer, unless a gradient is not finite; then the scale is updated."""
        self.scaler.step(optimizer)
        self.scaler.update()


def are_finite(grads: Sequence[Tensor]) -> bool:
    """Whether gradients have no element that is infinite or not a number."""
    if not grads:
        return True
    return bool(torch.stack([grad.isfinite().all().cpu() for grad in grads]).all())
