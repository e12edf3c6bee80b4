"""Evens out the stages of a pipeline by the costs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate, pairwise
from typing import Any

import torch.distributed as dist

from dualpipe_ext._handshake import collect
from dualpipe_ext.adapters.cost import Cost
from dualpipe_ext.adapters.split import best_for_ranks, best_for_stages, fronts
from dualpipe_ext.groups import PipelineGroup, has_group, resolve_group
from dualpipe_ext.schedule import CostModel, plan

__all__ = ["agreed", "balanced_sizes", "step_seconds", "sum_of"]

_TIMEOUT_S = 600.0  # for rank 0 to measure


def balanced_sizes(
    costs: Sequence[Cost], num_stages: int, criterion: str, paired: bool = True
) -> list[int]:
    """Returns how many consecutive costs each stage gets, at least one each.

    If each stage has a rank of its own, the costliest stage is made as cheap as possible. If rank r
    holds stages r and P-1-r (``paired``), the pair counts. For ``"memory"`` and ``"parameters"``,
    the fullest rank then holds as little as possible; among equal splits, the one whose fullest
    stage holds least wins. For ``"time"``, a step of 3P micro-batches is simulated for each split
    that no other split beats in both its slowest rank and its slowest stage; among those within
    half a percent of the fastest, the one with the fastest slowest stage wins.
    """
    amounts = [_amount(cost, criterion, num_stages) for cost in costs]
    if not paired:
        return best_for_stages(amounts, num_stages)
    if criterion != "time":
        return best_for_ranks(amounts, num_stages)
    found = [
        (step_seconds(sum_of(costs, sizes), 3 * num_stages), slowest, sizes)
        for _, slowest, sizes in fronts(amounts, num_stages)
    ]
    limit = 1.005 * min(step for step, *_ in found)
    return min((slowest, sizes) for step, slowest, sizes in found if step <= limit)[1]


def _amount(cost: Cost, criterion: str, num_stages: int) -> float:
    if criterion == "parameters":
        return cost.num_parameters
    return cost.memory(num_stages) if criterion == "memory" else cost.seconds


def step_seconds(stages: Sequence[Cost], num_microbatches: int) -> float:
    """Returns the makespan of a step of DualPipe over these stages, with instant messages."""
    costs = CostModel(
        forward=[stage.forward for stage in stages],
        backward_input=[stage.backward_input for stage in stages],
        backward_weight=[stage.backward_weight for stage in stages],
    )
    return plan("dualpipe", len(stages), num_microbatches).simulate(costs, sends="early").makespan


def sum_of(costs: Sequence[Cost], sizes: Sequence[int]) -> list[Cost]:
    """Returns the costs of stages of these sizes."""
    ranges = pairwise(accumulate(sizes, initial=0))
    return [sum(costs[start:stop], Cost()) for start, stop in ranges]


def agreed(
    measure: Callable[[], list[Cost]], process_group: dist.ProcessGroup | PipelineGroup | None
) -> list[Cost]:
    """Returns what rank 0 measures, on every rank, as all have to cut the model alike.

    Raises:
        Exception: what ``measure`` raised, on rank 0.
        PipelineError: ``measure`` raised on rank 0, or a rank did not join.
    """
    if not has_group(process_group):
        return measure()
    group = resolve_group(process_group, None)

    def measured_first() -> list[dict[str, Any]]:  # only by rank 0: others would slow it down
        return [asdict(cost) for cost in measure()] if group.rank == 0 else []

    costs, *_ = collect(group, _TIMEOUT_S, measured_first, "could not measure its layers")
    return [Cost(**entry) for entry in costs]
