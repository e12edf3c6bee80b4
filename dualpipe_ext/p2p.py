"""Hints about the tensors between stages, for code written for the reference implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["set_p2p_tensor_dtype", "set_p2p_tensor_shapes"]


def set_p2p_tensor_shapes(shapes: Sequence[Sequence[int]]) -> None:
    """Accepts the shapes of the tensors between stages.

    This is a hint that the engine does not need: shapes travel with the first message of a channel,
    are remembered, and may differ between micro-batches. They are checked for form, then ignored.

    Raises:
        TypeError: ``shapes`` is not a list of tuples of ints.
    """
    for shape in shapes:
        if not all(isinstance(size, int) for size in shape):
            raise TypeError(f"a shape is a tuple of ints; found {shape!r} in {shapes!r}")


def set_p2p_tensor_dtype(dtype: torch.dtype) -> None:
    """Accepts the dtype of the tensors between stages; a hint, like the shapes.

    Raises:
        TypeError: ``dtype`` is not a ``torch.dtype``.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"expected a torch.dtype such as torch.bfloat16; found {dtype!r}")
