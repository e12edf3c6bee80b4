"""Keeps less of a forward for its backward: the rest is recomputed, or moved to host memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dualpipe_ext._recompute import RecomputedBuffers
from dualpipe_ext.adapters.partition import Partition

__all__ = ["save_memory", "save_where_compiled"]

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
    save_where_compiled(stages)


def save_where_compiled(stages: Sequence[nn.Module]) -> None:
    """Makes layers that were compiled since keep less memory; called before each step.

    What ``layer.compile()`` compiles is the layer's call, in which nothing can be kept or
    recomputed as :class:`SavingForward` does: it is done around that call instead.
    """
    for module in nn.ModuleList(stages).modules():
        saving, compiled = module.__dict__.get("forward"), module._compiled_call_impl
        if not isinstance(saving, SavingForward) or compiled is None:
            continue
        if not isinstance(compiled, _SavingCall):
            module._compiled_call_impl = _SavingCall(compiled, saving)


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
        self._is_done_outside = False
        self._buffers = RecomputedBuffers()

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
        if self._is_done_outside or torch.compiler.is_compiling():
            return forward(*inputs)
        return self.run(forward, *inputs)

    def run(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        """Runs a forward of the module, keeping less of it."""
        if not torch.is_grad_enabled():
            return forward(*inputs)
        if self._how == "activation_checkpoint":
            contexts = self._buffers.contexts(self.module)
            return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)
        with saved_tensors_hooks(_to_host, _from_host):
            return forward(*inputs)

    @contextmanager
    def done_outside(self) -> Iterator[None]:
        """Makes calls within run the plain forward."""
        self._is_done_outside = True
        try:
            yield
        finally:
            self._is_done_outside = False

    def remove(self, module: nn.Module) -> None:
        """Restores the forward, and the compiled call, that the module had before."""
        del module.__dict__["forward"]
        if self._inner is not None:
            module.__dict__["forward"] = self._inner
        compiled = module._compiled_call_impl
        if isinstance(compiled, _SavingCall):
            module._compiled_call_impl = compiled.compiled

    def __deepcopy__(self, memo: dict[int, Any]) -> SavingForward:
        """Returns the same for the module's copy."""
        inner = copy.deepcopy(self._inner, memo)
        return SavingForward(copy.deepcopy(self.module, memo), inner, self._how)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[nn.Module, str]]:
        """Unpickles as the forward of the module's class."""
        return getattr, (self.module, "forward")


class _SavingCall:
    """The compiled call of a module, of which less is kept."""

    def __init__(self, compiled: Callable[..., Any], saving: SavingForward) -> None:
        self.compiled = compiled
        self._saving = saving

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Calls what was compiled."""
        return self._saving.run(partial(self._call, **options), *inputs)

    def _call(self, *inputs: Any, **options: Any) -> Any:
        with self._saving.done_outside():
            return self.compiled(*inputs, **options)


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
