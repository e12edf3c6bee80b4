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

import torch.distributed as dist
from torch import nn
from torch.distributed._composable.contract import _get_registry
from torch.nn.parallel import DistributedDataParallel

from dualpipe_ext._C import PipelineError, process_group_all_gather
from dualpipe_ext._sharded import mesh_groups
from dualpipe_ext.host_groups import host_group

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from dualpipe_ext.groups import PipelineGroup

__all__ = ["FullyShardedStages", "check_not_wrapped"]


def check_not_wrapped(stage: int, module: nn.Module) -> None:
    """Raises if a wrapper would reduce gradients in each backward, before W has computed them.

    Raises:
        ValueError: the stage or a part of it is wrapped in ``DistributedDataParallel`` or FSDP1.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for part in module.modules():
        if "replicate" in (_get_registry(part) or {}) and not _is_sharded(part):
            raise ValueError(
                f"stage {stage} was given to replicate(), which reduces gradients in the middle of "
                f"a step; shard it by fully_shard(module, mesh=...), or have "
                f"TrainingWrapper(mesh=...) run replicas"
            )
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

    A step runs FSDP's collectives only before its first and after its last computation. Before and
    in between, all replicas tell each other whether they have failed, so that they run as many.

    Args:
        modules: the stages, in the same order on all replicas.
        timeout: seconds that replicas may be apart at the beginning and at the end of a step.
    """

    def __init__(self, modules: Sequence[nn.Module], timeout: float) -> None:
        self._modules = modules
        self._timeout = timeout
        self._roots = self._find()
        self._is_checked = False
        self._replicas = mesh_groups(self._roots)
        self._pipeline: PipelineGroup | None = None  # None: no rank of it has anything sharded
        self._has_come = False  # to the exchange at the beginning of a step
        self._has_begun = False  # to gather

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._roots)

    def connect(self, pipeline: PipelineGroup | None) -> None:
        """Connects what replicas tell each other by; all ranks of all replicas call it.

        Args:
            pipeline: the ranks of this one, if any of them has something sharded.
        """
        self._pipeline = pipeline
        for group in self._replicas:
            host_group(group, self._timeout)

    @contextmanager
    def step(self, *, training: bool) -> Iterator[None]:
        """Reduces gradients after a step in which :meth:`begin` was called, and ends it for FSDP.

        Reduced gradients are added to those in ``.grad``, as FSDP does. Those of a failed step are
        dropped.

        Raises:
            PipelineError: the step failed on another replica, and so on all of them.
        """
        if self._pipeline is None:
            yield
            return
        self._has_come = self._has_begun = False
        succeeds = False
        try:
            try:
                yield
            except BaseException:
                if not self._has_come:
                    with suppress(PipelineError):
                        self._agree_with_replicas(1.0)
                with suppress(PipelineError):
                    self._agree(has_failed=True)
                raise
            self._agree(has_failed=False)
            for root in self._roots if training else ():
                _reduce(root)
            succeeds = True
        finally:
            for root in self._roots if self._has_begun else ():
                _end(root) if succeeds else _begin_anew(root)

    def begin(self) -> None:
        """Begins to gather all parameters, once all replicas have come to this step.

        Raises:
            ValueError: something was sharded after the pipeline was made.
            PipelineError: another replica has failed before this, or does not come.
        """
        if not self._is_checked and self._find() != self._roots:
            raise ValueError(
                "a stage was sharded after the pipeline was made, which knows nothing of it; call "
                "fully_shard() on stages first"
            )
        self._is_checked = True
        for root in self._roots:
            root._get_fsdp_state()._lazy_init()
        self._has_come = True
        self._agree_with_replicas(0.0)
        self._has_begun = True
        for root in self._roots:
            _gather(root)

    def _find(self) -> list[FSDPModule]:
        return [root for module in self._modules for root in _outermost(module)]

    def _agree(self, *, has_failed: bool) -> None:
        """Raises where the step has failed on any rank of any replica, whatever it holds."""
        assert self._pipeline is not None
        raised: PipelineError | None = None
        try:
            self._agree_with_replicas(float(has_failed))
        except PipelineError as error:
            raised = error
        try:
            failed = float(has_failed or raised is not None)
            told = self._pipeline.all_gather_floats([failed], self._timeout)
            if raised is not None:
                raise raised
            if any(flag for (flag,) in told):
                rank = next(rank for rank, (flag,) in enumerate(told) if flag)
                raise PipelineError(
                    f"this step has failed on another replica, as rank {rank} of this pipeline was "
                    f"told; what was raised there says why"
                )
        finally:
            raised = None  # its frames refer to this one

    def _agree_with_replicas(self, failed: float) -> None:
        """Raises where it has failed on one of them, once all groups know."""
        ranks: list[int] = []
        for group in self._replicas:
            told = process_group_all_gather(host_group(group), [failed], self._timeout)
            members = dist.get_process_group_ranks(group)
            ranks += [rank for rank, (flag,) in zip(members, told, strict=True) if flag]
            failed = float(bool(ranks))
        if ranks:
            raise PipelineError(
                f"this step has failed on another replica, on rank {ranks[0]} of all; what it "
                f"raised says why"
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


def _gather(root: FSDPModule) -> None:
    """Begins to gather all parameters; the forward of each module waits for its own."""
    _set_last(root, False)
    for group in _groups_of(root):
        group.post_forward_mesh_info = None  # a forward leaves them gathered
    for module in _sharded_modules(root):
        module.reshard()  # a call outside of steps may have left it gathered, as it was then
        module.unshard(async_op=True)


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
    for group in _groups_of(root):
        group.wait_for_unshard()  # of a module that was not called
    for module in _sharded_modules(root):
        module.reshard()


def _begin_anew(root: FSDPModule) -> None:
    """Resets FSDP, whatever its state, and drops the gradients that it held back.

    What fails in this is less than why it is called.
    """
    with suppress(Exception):
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
