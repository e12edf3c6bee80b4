"""Means of buffers over the copies of a stage, such as the running statistics of batch norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_ext._sharded import local_part
from dualpipe_ext.host_groups import group_at, reaching

__all__ = ["WideBuffer", "assign_means", "average_over", "wide_copies"]

WideBuffer = tuple[Tensor, Tensor]  # this rank's part of a buffer, and a copy to be summed


def average_over(group: dist.ProcessGroup | None, buffers: Iterable[Tensor]) -> None:
    """Sets each buffer that has a mean to its mean over all ranks of a group.

    Args:
        group: the replicas, which have the same buffers; ``None``: there is only one.
        buffers: the buffers of this rank.

    Raises:
        PipelineError: another rank does not join, or is gone.
    """
    if group is None:
        return
    sums = wide_copies(buffers)
    for _, total in sums:
        with reaching("another replica"):
            dist.all_reduce(total, group=group_at(group, total.device))
    assign_means(sums, group.size())


def wide_copies(buffers: Iterable[Tensor]) -> list[WideBuffer]:
    """Returns the buffers that have a mean, with copies so wide that equal ones stay the same."""
    found = [local_part(b).detach() for b in buffers if b.is_floating_point() or b.is_complex()]
    return [
        (own, own.to(torch.complex128 if own.is_complex() else torch.float64, copy=True))
        for own in found
    ]


def assign_means(sums: Sequence[WideBuffer], count: int) -> None:
    """Sets each buffer to its sum divided by ``count``, the number of copies summed."""
    with torch.no_grad():
        for buffer, total in sums:
            buffer.copy_(total / count)
