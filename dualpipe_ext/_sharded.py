"""Tensors of which each rank holds a part: DTensors, as FSDP2 and tensor parallelism use them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "ShardGroups",
    "as_sharded",
    "check_whole",
    "describe_sharding",
    "is_sharded",
    "local_part",
    "mesh_groups",
    "shard_groups",
]

ShardGroups = tuple["dist.ProcessGroup", ...]


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor, of any placement."""
    # Whoever has one has imported its module. Importing it here would take half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor, in the same memory; a plain tensor is its own part."""
    detached: Any = tensor.detach() if is_sharded(tensor) else None
    part: Tensor = tensor if detached is None else detached.to_local()
    return part


def as_sharded(part: Tensor, like: DTensor) -> DTensor:
    """Returns the tensor, sharded as ``like``, of which ``part`` is this rank's part."""
    return type(like).from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def check_whole(module: nn.Module, what: str, remedy: str) -> None:
    """Raises if a parameter is sharded.

    Raises:
        ValueError: one is; the message consists of ``what``, the parameter and the ``remedy``.
    """
    for name, parameter in module.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{what}, and {name} is sharded ({parameter.placements} on a mesh of "
                f"{tuple(parameter.device_mesh.shape)}): {remedy}"
            )


def mesh_groups(modules: Iterable[Any]) -> list[dist.ProcessGroup]:
    """All groups of ranks, each once, that hold the parts of some parameter, or copies of them."""
    meshes = (p.device_mesh for module in modules for p in module.parameters() if is_sharded(p))
    groups = (mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim))
    return list(dict.fromkeys(groups))


def shard_groups(tensor: Tensor) -> ShardGroups:
    """Returns the groups, one per sharded mesh dimension, whose ranks hold the tensor's parts.

    Raises:
        ValueError: the tensor is a partial sum, whose parts are yet to be added.
    """
    if not is_sharded(tensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"a gradient of placements {tensor.placements} has parts that are yet to be added; "
            f"redistribute it first, as in parameter.grad = parameter.grad.redistribute(placements="
            f"parameter.placements)"
        )
    mesh = tensor.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    )


def describe_sharding(tensor: Tensor) -> str:
    """Describes how a tensor is sharded and which part this rank holds; empty for a plain one."""
    if not is_sharded(tensor):
        return ""
    mesh = tensor.device_mesh
    placements = " ".join(str(placement) for placement in tensor.placements)
    return f", sharded {placements} on {tuple(mesh.shape)}, part {mesh.get_coordinate()}"
