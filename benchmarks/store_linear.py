"""A linear layer that uses the ``WeightGradStore`` protocol, for engines that need one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _StoreLinearFunction(torch.autograd.Function):
    """Computes the input gradient at once, and leaves the others to the store if it is enabled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, store: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.store = weight, bias, store
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        weight, bias, grad = ctx.weight, ctx.bias, grads[0]

        def add_weight_gradients() -> None:
            rows = grad.flatten(0, -2)
            weight.grad.addmm_(rows.T, x.flatten(0, -2))
            if bias is not None:
                bias.grad.add_(rows.sum(0))

        if ctx.store.enabled:
            ctx.store.put(add_weight_gradients)
        else:
            add_weight_gradients()
        return grad @ weight, None, None, None


class StoreLinear(nn.Linear):
    """``nn.Linear`` whose weight gradients go through ``store``."""

    store: Any

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        y = _StoreLinearFunction.apply(x, self.weight, self.bias, self.store)  # type: ignore[no-untyped-call]
        return y  # type: ignore[no-any-return]


def use_store(module: nn.Module, store: Any) -> None:
    """Makes every ``nn.Linear`` in ``module`` use ``store``, and gives parameters a ``grad``."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = StoreLinear
            each.store = store
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
