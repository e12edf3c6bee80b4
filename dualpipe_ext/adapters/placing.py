"""Puts partitions in their places in a pipeline, with those they share parameters with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dualpipe_ext.adapters.partition import Partition

__all__ = ["place_partitions", "split_of"]


def place_partitions(modules: Sequence[Any], stages: Sequence[int], num_stages: int) -> list[Any]:
    """Returns the modules of a rank, with its own partitions in their places.

    The same partition twice stands for itself and its mirror. Other modules are left as they are.

    Raises:
        ValueError: a partition is of another split or another stage, has no values, or is on
            another rank than one with which it shares a parameter.
    """
    placed = list(modules)
    if len(placed) == 2 and placed[0] is placed[1] and isinstance(placed[0], Partition):
        partition = placed[0]
        by_index = {p.plan.index: p for p in (partition.mirror(), partition)}
        placed = [by_index.get(stage, partition) for stage in stages]
    for module, stage in zip(placed, stages, strict=False):
        if isinstance(module, Partition):
            _check_place(module, stage, stages, num_stages)
    return placed


def _check_place(partition: Partition, stage: int, stages: Sequence[int], num_stages: int) -> None:
    plan = partition.plan
    if plan.num_partitions != num_stages:
        raise ValueError(
            f"a partition of {plan.num_partitions} was given to a pipeline of {num_stages} stages; "
            f"call partition(num_partitions={num_stages})"
        )
    if plan.index != stage:
        raise ValueError(
            f"partition {plan.index} was given for stage {stage}; this rank holds stages "
            f"{list(stages)}: pass [{', '.join(f'partitions[{s}]' for s in stages)}]"
        )
    if lost := [name for name, parameter in partition.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"partition {stage} has {lost[0]} on the meta device, without a value; call "
            f"to_empty(device=...) on the partition and load its state_dict() first"
        )
    for names in plan.ties:
        holders = sorted({holder for holder, _ in names})
        if stage in holders and not set(holders) <= set(stages):
            raise ValueError(
                f"{' and '.join(name for _, name in names)} are one parameter of stages {holders}, "
                f"and this rank holds stages {list(stages)} alone, so the copies would train "
                f"apart; use DualPipe, which keeps the first and the last stage on one rank, or "
                f"untie them before the model is partitioned"
            )


def split_of(modules: Sequence[nn.Module]) -> list[int] | None:
    """Returns how many layers each stage of a partitioned model has; ``None`` for other modules."""
    plans = [module.plan for module in modules if isinstance(module, Partition)]
    return [len(stage.layers) for stage in plans[0].stages] if plans else None
