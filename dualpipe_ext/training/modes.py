"""Temporary modes: evaluation and autocast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

__all__ = ["autocasting", "evaluating"]


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Returns a context of autocast to ``dtype``; ``None`` keeps the caller's."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def evaluating(stages: Sequence[nn.Module]) -> Iterator[None]:
    """Disables gradients and sets evaluation mode; afterwards restores the mode of every module."""
    modes = [(module, module.training) for stage in stages for module in stage.modules()]
    tops = [stage.training for stage in stages]
    for stage in stages:
        stage.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for stage, training in zip(stages, tops, strict=True):
            stage.train(training)  # reaches what a partition does not list among its modules
        for module, training in modes:
            module.training = training
