"""The forward of a linear layer that defers its weight gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext import _C

__all__ = ["deferred_forward"]


def deferred_forward(self: nn.Module, input: Tensor) -> Tensor:
    """Map (..., in) to (..., out) as the layer's class does, deferring weight gradients."""
    if torch.compiler.is_compiling() or _C.current_weight_queue() is None:
        plain: Callable[[nn.Module, Tensor], Tensor] = type(self).forward
        return plain(self, input)
    weight: Any = self.weight
    bias: Any = self.bias
    output: Tensor = _C.deferred_linear(
        input,
        weight,
        bias,
        transposed=not isinstance(self, nn.Linear),
        weight_main_grad=getattr(weight, "main_grad", None),
        bias_main_grad=getattr(bias, "main_grad", None),
    )
    return output


# A bound method is pickled as the name of its function: what is loaded is the class's own forward.
deferred_forward.__name__ = "forward"
