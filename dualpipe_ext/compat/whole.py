"""Assembles the whole model and its optimizer state from the parts of all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from dualpipe_ext.adapters.partition import Partition
from dualpipe_ext.compat.ranks import TrainerRanks
from dualpipe_ext.host_groups import reaching
from dualpipe_ext.pipeline import Pipeline

__all__ = [
    "on_host",
    "own_copy",
    "own_state_alone",
    "refuse_shards",
    "update_model",
    "whole_state",
]


def refuse_shards(optimizer: Optimizer) -> None:
    """Raises TypeError for an optimizer whose state is divided among the replicas."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__} has its state in shards, of which a trainer's checkpoint "
            f"would have one; use the optimizer within it, or dualpipe_ext.TrainingWrapper, which "
            f"saves all of them"
        )


@torch.no_grad()
def update_model(model: nn.Module, pipeline: Pipeline, ranks: TrainerRanks) -> None:
    """Gives the whole model, on every rank, the current values of all stages.

    Raises:
        PipelineError: a message of the last step failed, so that the values are worthless.
    """
    ranks.replicas.average_buffers(pipeline)
    pipeline.synchronize()
    values = model.state_dict()
    for stage, names in enumerate(_names(pipeline)):
        for name in names:
            value = values[name]
            sent = value.detach().cpu().contiguous()
            with reaching(f"rank {stage}"):
                dist.broadcast(sent, group=ranks.host, group_src=stage)
            if stage not in pipeline.stages:
                value.copy_(sent)


@contextmanager
def whole_state(
    optimizer: Optimizer, pipeline: Pipeline, group: dist.ProcessGroup
) -> Iterator[None]:
    """Makes ``state_dict()`` on the first rank return the state of all ranks, as if unsplit."""
    first_copy = {id(p) for p in own_copy(pipeline).parameters()}
    kept = {i for i, p in enumerate(_parameters(optimizer)) if id(p) in first_copy}
    own = {i: on_host(s) for i, s in optimizer.state_dict()["state"].items() if i in kept}
    states: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    with reaching("another rank"):
        dist.gather_object(own, states, group=group, group_dst=0)
    merged = {i: state for part in states or [] for i, state in part.items()}

    def complete(_: Optimizer, found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "state": dict(sorted(merged.items()))}

    handle = optimizer.register_state_dict_post_hook(complete)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def own_state_alone(optimizer: Optimizer, pipeline: Pipeline) -> Iterator[None]:
    """Makes ``load_state_dict()`` take only the state of this rank's parameters."""
    own = {id(p) for p in pipeline.parameters()}
    kept = {i for i, p in enumerate(_parameters(optimizer)) if id(p) in own}

    def narrow(_: Optimizer, found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "state": {i: s for i, s in found["state"].items() if i in kept}}

    handle = optimizer.register_load_state_dict_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


def own_copy(pipeline: Pipeline) -> nn.Module:
    """Returns this rank's module that is the first copy of its stage."""
    return pipeline.module[pipeline.stages.index(pipeline.rank)]


def _names(pipeline: Pipeline) -> Sequence[Sequence[str]]:
    """Returns the keys of each stage's ``state_dict()``."""
    partition = pipeline.module[0]
    assert isinstance(partition, Partition)
    return [stage.names for stage in partition.plan.stages]


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a parameter's state, with tensors in host memory."""
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
