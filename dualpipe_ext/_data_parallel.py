"""Stages changed by torch's data parallelism: sharded by FSDP2, or wrapped, which is refused.

FSDP gathers a stage's parameters for its forward, and reduces their gradients as soon as autograd has
finished a stage's backward: once for every micro-batch, and before the W that computes most of them.
Steps of a pipeline gather once, at their beginning, and reduce once, at their end.
``torch.distributed.pipelining`` reduces its stages so, too; as there is no public way, the few
internals of FSDP that are needed are confined to this file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dualpipe_ext._C import PipelineError, process_group_all_gather
from dualpipe_ext._sharded import mesh_groups
from dualpipe_ext.host_groups import host_group

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

__all__ = ["FullyShardedStages", "check_not_wrapped"]


def check_not_wrapped(stage: int, module: nn.Module) -> None:
    """Raises if a wrapper would reduce gradients in each backward, before W has computed them.

    Raises:
        ValueError: the stage or a part of it is wrapped in ``DistributedDataParallel`` or FSDP1.
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


class FullyShardedStages:
    """The modules that FSDP2 has sharded in the stages of one rank, if any.

    A step runs FSDP's collectives only before its first and after its last computation, and in
    between the replicas tell each other whether it failed, so that their collectives always match.

    Args:
        modules: the stages, in the same order on all replicas.
        timeout: seconds to wait for the other replicas at the end of a step.
    """

    def __init__(self, modules: Sequence[nn.Module], timeout: float) -> None:
        self._modules = modules
        self._timeout = timeout
        self._roots = self._find()
        self._is_known = False  # that there are no others
        self._replicas = mesh_groups(self._roots)
        for group in (group for root in self._roots for group in _groups_of(root)):
            group.post_forward_mesh_info = None  # a forward leaves parameters gathered

    def check(self) -> None:
        """Checks, in the first step, that nothing was sharded after the pipeline was made.

        Raises:
            ValueError: it was.
        """
        if not self._is_known and self._find() != self._roots:
            raise ValueError(
                "a stage was sharded after the pipeline was made, which knows nothing of it; call "
                "fully_shard() on stages first"
            )
        self._is_known = True

    @contextmanager
    def step(self, *, training: bool) -> Iterator[None]:
        """Gathers parameters for a step, and reduces gradients after it.

        Reduced gradients are added to those in ``.grad``, as FSDP does. Those of a failed step are
        dropped.

        Raises:
            PipelineError: the step failed on another replica, and so on all of them.
        """
        if not self._roots:
            yield
            return
        succeeds = False
        try:
            self._gather()
            try:
                yield
            except Exception:
                with suppress(PipelineError):
                    self._agree(has_failed=True)
                raise
            self._agree(has_failed=False)
            for root in self._roots if training else ():
                _reduce(root)
            succeeds = True
        finally:
            for root in self._roots:
                _end(root) if succeeds else _begin_anew(root)

    def _find(self) -> list[FSDPModule]:
        return [root for module in self._modules for root in _outermost(module)]

    def _gather(self) -> None:
        """Begins to gather all parameters; the forward of each module waits for its own."""
        for root in self._roots:
            _set_last(root, False)
            for module in _sharded_modules(root):
                module.unshard(async_op=True)

    def _agree(self, *, has_failed: bool) -> None:
        failed = float(has_failed)
        for group in self._replicas:
            told = process_group_all_gather(host_group(group), [failed], self._timeout)
            failed = max(flag for (flag,) in told)
        if failed:
            raise PipelineError(
                "this step has failed on another replica of the pipeline; what was raised there "
                "says why"
            )


def _outermost(module: nn.Module) -> Iterator[FSDPModule]:
    if _is_sharded(module):
        yield module  # type: ignore[misc]
        return
    for child in module.children():
        yield from _outermost(child)


def _is_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has such a module has imported it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _sharded_modules(root: Any) -> list[Any]:
    """The module and what is sharded by itself within it; of modules that FSDP has as one, one."""
    by_state = {m._get_fsdp_state(): m for m in root.modules() if _is_sharded(m)}
    return list(by_state.values())


def _groups_of(root: Any) -> list[Any]:
    """FSDP's groups of parameters, which are gathered and reduced together."""
    states = [module._get_fsdp_state() for module in _sharded_modules(root)]
    if all(hasattr(state, "_fsdp_param_groups") for state in states):
        return [group for state in states for group in state._fsdp_param_groups]
    single = (state._fsdp_param_group for state in states)  # up to torch 2.12
    return [group for group in single if group is not None]


def _set_last(root: FSDPModule, is_last: bool) -> None:
    """Tells FSDP whether the next backward is the last one before the gradients are used."""
    root.set_is_last_backward(is_last)
    root.set_requires_gradient_sync(is_last)
    root.set_reshard_after_backward(is_last)


def _reduce(root: FSDPModule) -> None:
    """Does what FSDP does at the end of a backward, for all gradients accumulated so far."""
    _set_last(root, True)
    for group in _groups_of(root):
        group.post_backward()
    root._get_fsdp_state()._root_post_backward_final_callback()


def _end(root: FSDPModule) -> None:
    """Leaves the module as it was before the step: sharded."""
    _set_last(root, True)
    for module in _sharded_modules(root):
        module.reshard()


def _begin_anew(root: FSDPModule) -> None:
    """Resets FSDP, whatever its state, and drops the gradients that it held back."""
    for managed in (managed for group in _groups_of(root) for managed in group.fsdp_params):
        managed.unsharded_accumulated_grad = None
        if hasattr(managed, "_unsharded_param"):
            managed._unsharded_param.grad = None
    _set_last(root, True)
    if hasattr(root, "reset_iter_state"):  # from torch 2.13 on
        root.reset_iter_state()
    else:
        root.set_requires_gradient_sync(False)  # there is nothing to reduce
        root._get_fsdp_state()._state_ctx.iter_forward_root = None
        root._get_fsdp_state()._root_post_backward_final_callback()
    _end(root)
