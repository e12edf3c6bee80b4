"""Modes for a while: evaluation, autocast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

__all__ = ["autocasting", "evaluating"]


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to a type; the caller's, where there is none."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def evaluating(stages: Sequence[nn.Module]) -> Iterator[None]:
    """No gradients, and evaluation mode; afterwards every module has the mode that it had."""
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
