"""Keeps less of a forward for its backward: the rest is recomputed, or moved to host memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dualpipe_ext._recompute import buffers_once
from dualpipe_ext.adapters.partition import Partition

__all__ = ["save_memory"]

HOST = "cpu"


def save_memory(stages: Sequence[nn.Module], how: str) -> None:
    """Makes stages keep less memory, as ``DualPipeConfig.memory_optimization`` says.

    Undoes an earlier call first. Parameters, names and hooks of modules stay as they are.
    """
    for module in nn.ModuleList(stages).modules():
        saving = module.__dict__.get("forward")
        if isinstance(saving, SavingForward):
            saving.remove(module)
    for module in _targets(stages, how):
        module.__dict__["forward"] = SavingForward(module, module.__dict__.get("forward"), how)


def _targets(stages: Sequence[nn.Module], how: str) -> Iterator[nn.Module]:
    for stage in stages if how != "none" else ():
        if how == "activation_checkpoint" and isinstance(stage, Partition):
            yield from (stage.get_submodule(name) for name in stage.plan.layers)
        else:
            yield stage


class SavingForward:
    """The forward of one module, which owns it; a bound method would form a reference cycle.

    ``inner`` is the forward that the module itself had in place of its class's, if any.
    """

    def __init__(self, module: nn.Module, inner: Callable[..., Any] | None, how: str) -> None:
        self._owner = weakref.ref(module)
        self._inner = inner
        self._how = how

    @property
    def module(self) -> nn.Module:
        """The module whose forward this is.

        Raises:
            ReferenceError: the module no longer exists.
        """
        module = self._owner()
        if module is None:
            raise ReferenceError(
                "the forward of a module was used after the module itself was freed; keep the "
                "module and call that"
            )
        return module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Runs the module's forward, keeping less of it."""
        module = self.module
        forward = partial(self._inner or partial(type(module).forward, module), **options)
        if not torch.is_grad_enabled():
            return forward(*inputs)
        if self._how == "activation_checkpoint":
            contexts = buffers_once(module)
            return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)
        with saved_tensors_hooks(_to_host, _from_host):
            return forward(*inputs)

    def remove(self, module: nn.Module) -> None:
        """Restores the forward that the module had before."""
        del module.__dict__["forward"]
        if self._inner is not None:
            module.__dict__["forward"] = self._inner

    def __deepcopy__(self, memo: dict[int, Any]) -> SavingForward:
        """Returns the same for the module's copy."""
        inner = copy.deepcopy(self._inner, memo)
        return SavingForward(copy.deepcopy(self.module, memo), inner, self._how)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[nn.Module, str]]:
        """Unpickles as the forward of the module's class."""
        return getattr, (self.module, "forward")


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Returns what to keep of a saved tensor. Parameters are not copied: they are held anyway."""
    owner = tensor._base if tensor._is_view() else tensor
    if tensor.device.type == HOST or isinstance(owner, nn.Parameter):
        return tensor.device, tensor.detach()
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    # Pinned memory is read on the same stream; other memory, by the host, as soon as this returns.
    return tensor.device, kept.copy_(tensor, non_blocking=kept.is_pinned())


def _from_host(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = kept
    return tensor.to(device, non_blocking=tensor.is_pinned())
