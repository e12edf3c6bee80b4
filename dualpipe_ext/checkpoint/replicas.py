"""Checkpoints under data parallelism: the first replica saves, the others wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext._C import PipelineError

__all__ = ["average_buffers", "gather_from_replicas", "on_first_replica", "replica_of"]


def replica_of(replicas: dist.ProcessGroup | None) -> int:
    """Which replica this rank belongs to."""
    return 0 if replicas is None else dist.get_rank(replicas)


def average_buffers(replicas: dist.ProcessGroup | None, buffers: Iterable[Tensor]) -> None:
    """Gives all replicas the mean of each floating-point buffer, as their mirrors have it."""
    if replicas is None:
        return
    for buffer in (each for each in buffers if each.is_floating_point()):
        total = buffer.to(torch.float64, copy=True)
        dist.all_reduce(total, group=replicas)
        buffer.copy_(total / replicas.size())


def gather_from_replicas(replicas: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """The value of each replica."""
    if replicas is None:
        return [value]
    gathered: list[Any] = [None] * replicas.size()
    dist.all_gather_object(gathered, value, group=replicas)
    return gathered


def on_first_replica(replicas: dist.ProcessGroup | None, save: Callable[[], Path]) -> Path:
    """Calls ``save`` on the first replica, and returns its result on all of them.

    Raises:
        Exception: what ``save`` raised, on the first replica.
        PipelineError: the same on the others, as text.
    """
    if replicas is None:
        return save()
    failure: Exception | None = None
    outcome = [("", "")]
    if replica_of(replicas) == 0:
        try:
            outcome = [(str(save()), "")]
        except Exception as error:  # noqa: BLE001 - the other replicas must not wait
            failure = error
            outcome = [("", f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(outcome, group=replicas, group_src=0)
    if failure is not None:
        raise failure
    ((place, text),) = outcome
    if text:
        raise PipelineError(f"the first replica could not save the checkpoint: {text}")
    return Path(place)
