"""The options of a training loop, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch

from dualpipe_ext.training.losses import LossFunction, Reduction

__all__ = ["LoopOptions"]


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """The options of :class:`dualpipe_ext.TrainingWrapper` that are the same on all ranks."""

    loss_fn: LossFunction | None
    reduction: Reduction | None
    ignore_index: int
    shifts_labels: bool | None
    max_grad_norm: float | None
    accumulation_steps: int
    autocast: torch.dtype | None
    input_names: tuple[str, ...] | None
    label_names: tuple[str, ...]
    batch_dim: int

    def check(self) -> None:
        """Raises ValueError or TypeError if a value is not allowed."""
        for name, least in (("accumulation_steps", 1), ("batch_dim", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r}: it must be an int, not {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}={value}: it must be at least {least}")
        if self.shifts_labels not in (None, True, False):
            raise TypeError(f"shifts_labels={self.shifts_labels!r}: it must be True, False or None")
        norm = self.max_grad_norm
        if isinstance(norm, bool) or not isinstance(norm, Real | None):
            raise TypeError(
                f"max_grad_norm={norm!r}: it must be a number, not {type(norm).__name__}"
            )
        if norm is not None and not norm > 0:
            raise ValueError(
                f"max_grad_norm={norm}: it must be above 0; use float('inf') to "
                f"measure without clipping, and None to do neither"
            )
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"autocast={self.autocast}: choose torch.bfloat16, torch.float16 with a scaler, or "
                f"None"
            )

    def to_compare(self) -> dict[str, Any]:
        """Returns what must be equal on all ranks, for :func:`dualpipe_ext._handshake.agree`."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "loss_fn"}
        return {**settings, "autocast": str(self.autocast), "stages": {}}
