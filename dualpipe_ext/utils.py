"""Helpers for custom backward functions and overlapped stages; the profiler of steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualpipe_ext.profiling import Profiler, disable_profiling, enable_profiling, get_profiler
from dualpipe_ext.weight_grad import WeightGradStore

__all__ = [
    "Profiler",
    "WeightGradStore",
    "disable_profiling",
    "enable_profiling",
    "get_profiler",
    "run_backward",
]


def run_backward(tensors: Sequence[Tensor | None], grad_tensors: Sequence[Tensor | None]) -> None:
    """Runs the backward pass of a stage from its outputs, accumulating into ``.grad``.

    Args:
        tensors: outputs of the stage; those that require no gradient are skipped.
        grad_tensors: their gradients, of the same shapes; ``None`` where there is none.

    Raises:
        ValueError: the two differ in length.
    """
    if len(tensors) != len(grad_tensors):
        raise ValueError(
            f"run_backward was given {len(tensors)} tensors and {len(grad_tensors)} gradients; "
            "give one gradient, or None, for each tensor"
        )
    pairs = [
        (tensor, grad)
        for tensor, grad in zip(tensors, grad_tensors, strict=True)
        if tensor is not None and tensor.requires_grad and grad is not None
    ]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
