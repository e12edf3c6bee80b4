"""Stages that torch's data parallelism has changed: sharded by FSDP2, or wrapped, which is refused.

FSDP gathers a stage's parameters for its forward, and reduces their gradients as soon as autograd is
through with a stage's backward: once for every micro-batch, and before the W that computes most of
them. Steps hold that back, and have it done once at their end. ``torch.distributed.pipelining`` does
so for its own stages; there is no public way, so that the few internals are in this file alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

__all__ = ["FullyShardedStages", "check_not_wrapped", "plain_in_forward"]


def check_not_wrapped(stage: int, module: nn.Module) -> None:
    """Raises where a wrapper would reduce gradients in each backward, before W has computed them.

    Raises:
        ValueError: the stage, or a part of it, is in ``DistributedDataParallel``, or in FSDP1.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrappers = (DistributedDataParallel, *((fsdp.FullyShardedDataParallel,) if fsdp else ()))
    wrapped = [(name, part) for name, part in module.named_modules() if isinstance(part, wrappers)]
    if wrapped:
        name, part = wrapped[0]
        raise ValueError(
            f"{name or 'the module'} of stage {stage} is wrapped in {type(part).__name__}, which "
            f"reduces gradients in the middle of a step; give the module within it, and shard that "
            f"by fully_shard(module, mesh=...), or have TrainingWrapper(mesh=...) run replicas"
        )


def plain_in_forward(module: nn.Module) -> set[int]:
    """The identities of parameters that are sharded now, but whole and plain in a forward."""
    return {
        id(managed.sharded_param)
        for root in _outermost(module)
        for state in _states(root)
        for group in _groups(state)
        for managed in group.fsdp_params
        if not managed.is_dtensor  # those that tensor parallelism has sharded as well stay so
    }


class FullyShardedStages:
    """What FSDP has sharded of the stages of one rank; it may be nothing.

    Args:
        modules: the stages, in the same order on all replicas.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._roots = self._find()
        self._is_known = False  # that nothing was sharded since

    def check(self) -> None:
        """For the first step of a pipeline.

        Raises:
            ValueError: something was sharded after the pipeline was made.
        """
        if not self._is_known and self._find() != self._roots:
            raise ValueError(
                "a stage was sharded after the pipeline was made, which knows nothing of it; call "
                "fully_shard() on stages first"
            )
        self._is_known = True

    @contextmanager
    def step(self, *, training: bool) -> Iterator[None]:
        """A step of the pipeline: parameters stay gathered, and gradients are reduced at its end.

        They are added to those in ``.grad``, as FSDP does. Those of a step that failed are dropped.
        """
        for root in self._roots:
            _set_last(root, False)
        try:
            yield
            for root in self._roots if training else ():
                _reduce(root)
        except BaseException:
            for root in self._roots:
                _drop(root)
            raise
        finally:
            for root in self._roots:
                _set_last(root, True)
                root.reshard()

    def _find(self) -> list[FSDPModule]:
        return [root for module in self._modules for root in _outermost(module)]


def _outermost(module: nn.Module) -> Iterator[FSDPModule]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # who has such a module has imported it
        return
    if isinstance(module, fsdp.FSDPModule):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _states(root: Any) -> list[Any]:
    """Those of the module and of what is sharded by itself within it, each once."""
    states = (m._get_fsdp_state() for m in root.modules() if _is_fsdp(m))
    return list(dict.fromkeys(states))


def _is_fsdp(module: nn.Module) -> bool:
    return isinstance(module, sys.modules["torch.distributed.fsdp"].FSDPModule)


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)  # from torch 2.12 on; before, there was one
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


def _set_last(root: FSDPModule, is_last: bool) -> None:
    """Whether the next backward is the last one before the gradients are used."""
    root.set_is_last_backward(is_last)
    root.set_requires_gradient_sync(is_last)
    root.set_reshard_after_backward(is_last)


def _reduce(root: FSDPModule) -> None:
    """What FSDP does at the end of a backward, with all that was added up since."""
    _set_last(root, True)
    for state in _states(root):
        for group in _groups(state):
            group.post_backward()
    root._get_fsdp_state()._root_post_backward_final_callback()


def _drop(root: FSDPModule) -> None:
    """Has FSDP begin anew, whatever it was at, without the gradients that it held back."""
    states = _states(root)
    state = root._get_fsdp_state()
    for group in (group for each in states for group in _groups(each)):
        for managed in group.fsdp_params:
            managed.unsharded_accumulated_grad = None
            if hasattr(managed, "_unsharded_param"):
                managed._unsharded_param.grad = None
    if hasattr(root, "reset_iter_state"):  # from torch 2.13 on
        root.reset_iter_state()
        return
    root.set_requires_gradient_sync(False)
    state._state_ctx.iter_forward_root = None
    state._root_post_backward_final_callback()
