"""Gradients of replicas, summed bucket by bucket with torch's collectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext.gradients import main_grads
from dualpipe_ext.host_groups import group_at, host_group, reaching

__all__ = ["Bucket", "find_gradients", "make_buckets"]


@dataclass(frozen=True)
class Bucket:
    """Gradients of one type and device.

    Attributes:
        grads: the gradients, which are summed in place.
        flat: memory for all of them, which other buckets use as well.
    """

    grads: list[Tensor]
    flat: Tensor

    def sum(self, group: dist.ProcessGroup) -> None:
        """Sums the gradients over the ranks of the group; all of them get the same bits.

        Raises:
            PipelineError: another rank cannot be reached.
        """
        torch.cat([grad.reshape(-1) for grad in self.grads], out=self.flat)
        with reaching("another replica"):
            dist.all_reduce(self.flat, group=group_at(group, self.flat.device))
        sizes = [grad.numel() for grad in self.grads]
        for grad, total in zip(self.grads, self.flat.split(sizes), strict=True):
            grad.copy_(total.view_as(grad))


def find_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> list[bool]:
    """Finds which of the parameters have a gradient on any rank of the group.

    Args:
        parameters: the same on all ranks, in the same order.
        group: the ranks, which call this together.

    Raises:
        PipelineError: another rank cannot be reached.
    """
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    if has.numel():
        with reaching("another replica"):
            dist.all_reduce(has, op=dist.ReduceOp.MAX, group=host_group(group))
    return [bool(found) for found in has]


def make_buckets(
    parameters: Sequence[nn.Parameter], found: Sequence[bool], bucket_bytes: int
) -> list[Bucket]:
    """Makes buckets of all gradients that are to be summed, and all memory for it.

    Args:
        parameters: those without a gradient get one of zeros if another rank has one.
        found: what :func:`find_gradients` returned.
        bucket_bytes: the approximate size of a bucket.
    """
    for parameter, is_anywhere in zip(parameters, found, strict=True):
        if is_anywhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [p.grad for p in parameters if p.grad is not None] + main_grads(parameters)
    cut = list(_cut([grad.detach() for grad in grads], bucket_bytes))
    sizes = [sum(grad.numel() for grad in bucket) for bucket in cut]
    memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    for bucket, size in sorted(zip(cut, sizes, strict=True), key=lambda pair: -pair[1]):
        if _kind(bucket[0]) not in memory:
            memory[_kind(bucket[0])] = bucket[0].new_empty(size)
    return [
        Bucket(bucket, memory[_kind(bucket[0])][:size])
        for bucket, size in zip(cut, sizes, strict=True)
    ]


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _cut(grads: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Yields consecutive gradients of one kind, of about ``bucket_bytes`` together."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (size >= bucket_bytes or _kind(bucket[0]) != _kind(grad)):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel() * grad.element_size()
    if bucket:
        yield bucket
