"""The forward of a linear layer that defers its weight gradients."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext import _C
from dualpipe_ext._sharded import is_sharded

__all__ = ["DeferredForward"]


class DeferredForward:
    """The forward of one layer, which owns it; a bound method would form a reference cycle."""

    def __init__(self, layer: nn.Module) -> None:
        """Stands in for the forward of the class of ``layer``."""
        self._layer = weakref.ref(layer)

    @property
    def layer(self) -> nn.Module:
        """The layer whose forward this is.

        Raises:
            ReferenceError: the layer no longer exists.
        """
        layer = self._layer()
        if layer is None:
            raise ReferenceError(
                "the forward of a linear layer was used after the layer itself was freed; keep the "
                "layer and call that"
            )
        return layer

    def __call__(self, input: Tensor) -> Tensor:
        """Maps (..., in) to (..., out) as the layer's class does, deferring weight gradients."""
        return _deferred_forward(self.layer, input)

    def __deepcopy__(self, memo: dict[int, Any]) -> DeferredForward:
        """Stands in for the forward of the layer's copy."""
        return DeferredForward(copy.deepcopy(self.layer, memo))

    def __reduce__(self) -> tuple[Callable[..., object], tuple[nn.Module, str]]:
        """Unpickles as the forward of the layer's class."""
        return getattr, (self.layer, "forward")


def _deferred_forward(self: nn.Module, input: Tensor) -> Tensor:
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
        sharded=is_sharded(weight),
    )
    return output
