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
    """Gives all ranks of a group the mean of each buffer that has one.

    Args:
        group: replicas, which have the same buffers; ``None``: there is one.
        buffers: this rank's.

    Raises:
        PipelineError: another one does not come, or is gone.
    """
    if group is None:
        return
    sums = wide_copies(buffers)
    for _, total in sums:
        with reaching("another replica"):
            dist.all_reduce(total, group=group_at(group, total.device))
    assign_means(sums, group.size())


def wide_copies(buffers: Iterable[Tensor]) -> list[WideBuffer]:
    """The buffers that have a mean, in a type in which that of equal numbers is the number."""
    found = [local_part(b).detach() for b in buffers if b.is_floating_point() or b.is_complex()]
    return [
        (own, own.to(torch.complex128 if own.is_complex() else torch.float64, copy=True))
        for own in found
    ]


def assign_means(sums: Sequence[WideBuffer], count: int) -> None:
    """Gives each buffer its sum, which is over so many copies, divided by their number."""
    with torch.no_grad():
        for buffer, total in sums:
            buffer.copy_(total / count)
