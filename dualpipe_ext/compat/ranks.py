"""Ranks that are processes: their groups, their devices, and the outputs at both ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dualpipe_ext._handshake import act_together, check_others
from dualpipe_ext._ranks import Ranks
from dualpipe_ext.groups import PipelineGroup, resolve_group
from dualpipe_ext.host_groups import TIMEOUT_S, host_group, reaching
from dualpipe_ext.pipeline import Pipeline
from dualpipe_ext.training.replicas import Replicas, split_mesh

__all__ = [
    "TrainerRanks",
    "both_ends",
    "check_others_update",
    "rank_device",
    "through_together",
    "update_together",
]

T = TypeVar("T")

_UPDATE_FAILURE = "could not update its parameters"


@dataclass(frozen=True)
class TrainerRanks:
    """The ranks of a trainer: those of this pipeline, and of the replicas beside it.

    Attributes:
        group: this pipeline's group.
        replicas: the ranks at the same position of all pipelines.
        host: this pipeline's group for data in host memory.
    """

    group: PipelineGroup
    replicas: Replicas
    host: dist.ProcessGroup

    @classmethod
    def of(
        cls,
        process_group: dist.ProcessGroup | None = None,
        replica_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
    ) -> TrainerRanks:
        """Makes the ranks from arguments as of :class:`dualpipe_ext.TrainingWrapper`; all call it.

        Raises:
            ValueError: there is no process group, or a mesh has other axes or was given besides
                groups.
        """
        if mesh is not None:
            process_group, replica_group = split_mesh(mesh, process_group, replica_group)
        group = process_group or _default_group()
        return cls(resolve_group(group, None), Replicas(replica_group), host_group(group))

    @property
    def number(self) -> int:
        """This rank's number, from 0, among the ranks of all replicas."""
        return self.replicas.index * self.group.size + self.group.rank


def _default_group() -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise ValueError(
            "there is no process group, so there are no ranks to train on: start the script with "
            "torchrun --nproc-per-node, or call torch.distributed.init_process_group() first"
        )
    group = dist.group.WORLD
    assert group is not None
    return group


def rank_device(device: torch.device, rank: int) -> torch.device:
    """Returns the device of a rank's stages; if no launcher chose a GPU, one by its number."""
    if device.type != "cuda" or (device.index is not None and "LOCAL_RANK" in os.environ):
        return device
    return torch.device("cuda", rank % torch.cuda.device_count())


def through_together(ranks: TrainerRanks, act: Callable[[], object], failure: str) -> None:
    """Calls ``act``, in which one rank writes; returns or raises once every rank has finished.

    Raises as :meth:`dualpipe_ext._ranks.Ranks.share` does, over all replicas.
    """
    own = Ranks(ranks.group, TIMEOUT_S)
    ranks.replicas.together(lambda: own.share_here(act, failure))


def update_together(pipeline: Pipeline, replicas: Replicas, step: Callable[[], T]) -> T:
    """Steps the optimizer of every rank; if one raises, all others raise as well.

    Raises:
        Exception: what ``step`` raised on this rank, once the others know of it.
        PipelineError: ``step`` raised on another rank. Ranks then differ in their parameters:
            continue from a checkpoint.
    """
    made: list[T] = []
    replicas.together(
        lambda: act_together(
            pipeline.group,
            pipeline.config.timeout,
            lambda: made.append(step()),
            failure=_UPDATE_FAILURE,
        )
    )
    return made[0]


def check_others_update(pipeline: Pipeline) -> None:
    """Raises if another rank failed in :func:`update_together`; called before an exchange in it."""
    check_others(pipeline.group, pipeline.config.timeout, _UPDATE_FAILURE)


def both_ends(own: Any, pipeline: Pipeline, group: dist.ProcessGroup) -> Tensor:
    """Returns the first output of all rows of a pipeline, on every rank and in host memory.

    Args:
        own: the outputs that :meth:`Pipeline.step` returned here.
        pipeline: the pipeline that returned them; its schedule is DualPipe.
        group: its ranks.
    """
    parts = []
    for end in (pipeline.num_ranks - 1, 0):  # the first rows leave on the last rank
        box = [_first(own).cpu() if pipeline.rank == end else torch.empty(0)]
        with reaching(f"rank {end}"):
            dist.broadcast_object_list(box, group=group, group_src=end)
        parts.append(box[0])
    return torch.cat(parts)


def _first(outputs: Any) -> Tensor:
    first: Tensor | list[Tensor] = outputs[0] if isinstance(outputs, tuple) else outputs
    return torch.cat(first) if isinstance(first, list) else first
