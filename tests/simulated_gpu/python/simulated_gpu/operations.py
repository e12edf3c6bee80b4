"""What operations of a GPU are on the CPU, where that is not the same operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simulated_gpu.memory import map_tensors

__all__ = ["calculate", "dropout", "wide_product"]

_HALVES = (torch.bfloat16, torch.float16)
_UNKNOWN_TYPES = ("not implemented for", "expected scalar type", "mixed dtype")


def calculate(op: Any, args: Any, kwargs: Any) -> Any:
    """The operation."""
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        if not any(text in str(error) for text in _UNKNOWN_TYPES):
            raise
    return _calculate_in_float32(op, args, kwargs)


def dropout(op: Any, args: Any, kwargs: Any) -> Any:
    """``native_dropout``, with numbers of a generator."""
    x, p, training = args
    if x.is_meta:
        return op(*args)
    if not training or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    drawn = torch.empty_like(x, dtype=torch.float32).uniform_(generator=kwargs["generator"])
    mask = drawn >= p
    return x * mask / (1 - p), mask


def wide_product(op: Any, args: Any, kwargs: Any) -> Any:
    """A product of bf16 or float16 that is summed in float32 and stays so."""
    *tensors, dtype = args
    plain = getattr(op.overloadpacket, "out" if "out" in kwargs else "default")
    return plain(*(x.to(dtype) for x in tensors), **kwargs)


def _calculate_in_float32(op: Any, args: Any, kwargs: Any) -> Any:
    widened: list[tuple[Tensor, Tensor]] = []

    def widen(x: Tensor) -> Tensor:
        if x.dtype not in _HALVES:
            return x
        widened.append((x, x.float()))
        return widened[-1][1]

    wide_args, wide_kwargs = map_tensors(widen, (list(args), kwargs))
    results = op(*wide_args, **wide_kwargs)
    for x, wide in widened:
        x.copy_(wide)  # those that were written
    return results
