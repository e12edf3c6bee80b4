"""A module with buffers of many types, and what replicas that are processes make of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext._buffers import average_over

KINDS = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int64, torch.bool]


class Buffers(nn.Module):
    """One of each kind, of which a rank has its own values."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        for number, kind in enumerate(KINDS):
            value = torch.arange(3) + 2.0 * rank
            turned = torch.complex(value, -value) if kind.is_complex else value
            self.register_buffer(f"buffer{number}", turned.to(kind))


def over_replicas(rank: int, num_ranks: int) -> list[Tensor]:
    buffers = list(Buffers(rank).buffers())
    average_over(dist.group.WORLD, buffers)
    average_over(None, buffers)
    return buffers
