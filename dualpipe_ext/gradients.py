"""Norms of gradients over a pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext._sharded import ShardGroups, is_sharded, local_part, shard_groups

__all__ = [
    "MainGrads",
    "clip_local_gradients",
    "gradients_of",
    "main_grads",
    "parameters_with_main_grad",
    "settle_placements",
    "total_norm",
]

MainGrads = list[tuple[int, list[tuple[Tensor, Tensor]]]]  # (stage, (parameter, main_grad) pairs)
GatherNumbers = Callable[[Callable[[], float]], list[float]]  # what each rank computes, by rank


def settle_placements(parameters: Iterable[Tensor]) -> None:
    """Gives sharded gradients the placements of their parameters, on all ranks that hold parts.

    Tensor parallelism may leave partial sums, or whole gradients of sharded parameters.
    """
    for parameter in parameters:
        grad: Any = parameter.grad
        if is_sharded(parameter) and grad is not None and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)


def total_norm(parameters: Iterable[Tensor], norm_type: float, gather: GatherNumbers) -> Tensor:
    """Returns the norm over all ranks, in float64; each passes the parameters that it counts."""
    counted = list(parameters)

    def power_sum() -> float:
        settle_placements(counted)
        return _power_sum(gradients_of(counted), norm_type)

    by_rank = gather(power_sum)
    if math.isinf(norm_type):
        return torch.tensor(_largest(by_rank), dtype=torch.float64)
    return torch.tensor(math.fsum(by_rank) ** (1.0 / norm_type), dtype=torch.float64)


def clip_local_gradients(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales gradients in place by ``min(1, max_norm / (norm + 1e-6))``, as torch does.

    An infinite ``max_norm`` changes nothing, whatever the norm.
    """
    if math.isinf(max_norm):
        return
    scale = max_norm / (float(norm) + 1e-6)
    grads = [local_part(grad) for grad in gradients_of(parameters)]
    if not scale >= 1.0 and grads:  # also if the norm is NaN, which spreads
        torch._foreach_mul_(grads, scale)


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Returns each parameter's ``.grad``, or its ``main_grad`` if the gradient is kept there."""
    grads = (p.grad if p.grad is not None else getattr(p, "main_grad", None) for p in parameters)
    return [grad for grad in grads if grad is not None]


def main_grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Returns each ``main_grad`` there is, unless it shares its memory with ``.grad``."""
    found = [(p, getattr(p, "main_grad", None)) for p in parameters]
    return [main for p, main in found if main is not None and not _is_same(p.grad, main)]


def parameters_with_main_grad(
    stages: Mapping[int, nn.Module],
) -> MainGrads:
    """Returns the parameters that have a ``main_grad``, with it, for each stage that has any.

    Raises:
        ValueError: one also has a ``.grad``; a step could not tell what is in it.
    """
    found: MainGrads = []
    for stage, module in stages.items():
        pairs = [(p, getattr(p, "main_grad", None)) for p in module.parameters()]
        having: list[tuple[Tensor, Tensor]] = [(p, main) for p, main in pairs if main is not None]
        for parameter, main in having:
            if is_sharded(parameter):
                name = _name_of(parameter, module)
                raise ValueError(
                    f"{name} of stage {stage} is sharded and has a main_grad, to which torch's shards "
                    f"add nothing: leave it out; FSDP's MixedPrecisionPolicy(reduce_dtype="
                    f"torch.float32) keeps gradients in float32"
                )
            if parameter.grad is not None and not _is_same(parameter.grad, main):
                name = _name_of(parameter, module)
                raise ValueError(
                    f"{name} of stage {stage} has both a main_grad, to which a step adds its "
                    f"gradient, and a .grad from before it or from a step that failed: set .grad to "
                    f"None first"
                )
        if having:
            found.append((stage, having))
    return found


def _name_of(parameter: Tensor, module: nn.Module) -> str:
    return next(name for name, p in module.named_parameters() if p is parameter)


def _is_same(grad: Tensor | None, main: Tensor) -> bool:
    return grad is not None and local_part(grad).data_ptr() == local_part(main).data_ptr()


def _power_sum(grads: Sequence[Tensor], norm_type: float) -> float:
    """Returns sum(|g|^p) over all elements and shards, or the largest |g| for p = inf."""
    by_sharding: dict[ShardGroups, list[Tensor]] = {}
    for grad in grads:
        if grad.layout != torch.strided:
            raise ValueError(
                f"a gradient of shape {tuple(grad.shape)} is {str(grad.layout).removeprefix('torch.')}"
                f", which has no norm here; make its embedding with sparse=False"
            )
        by_sharding.setdefault(shard_groups(grad), []).append(local_part(grad))
    is_max = math.isinf(norm_type)
    powers = [
        _sum_over(groups, _local_power_sum(parts, norm_type), is_max)
        for groups, parts in by_sharding.items()
    ]
    return _largest(powers) if is_max else math.fsum(powers)


def _local_power_sum(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Returns the same of local tensors, as a float64 scalar on their device."""
    there = [grad for grad in grads if grad.numel()]  # an empty one has no largest element
    if not there:
        return torch.zeros((), dtype=torch.float64, device=grads[0].device)
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(there, norm_type)])
    return norms.max() if math.isinf(norm_type) else norms.pow(norm_type).sum()


def _sum_over(groups: ShardGroups, power: Tensor, is_max: bool) -> float:
    """Reduces ``power`` over all shards; each rank of the groups holds one."""
    if not is_max:
        for group in groups:
            dist.all_reduce(power, dist.ReduceOp.SUM, group=group)
        return float(power)
    # The largest of numbers and a NaN may be a number, depending on their order.
    largest = torch.stack([power.nan_to_num(nan=0.0, posinf=math.inf), power.isnan().double()])
    for group in groups:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return math.nan if largest[1] else float(largest[0])


def _largest(values: Sequence[float]) -> float:
    """Returns the largest value, 0 if there is none; NaN if any is, unlike ``max``."""
    return math.nan if any(math.isnan(value) for value in values) else max(values, default=0.0)
