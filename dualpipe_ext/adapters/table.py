"""Shows a plan as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dualpipe_ext.adapters.cost import Cost
from dualpipe_ext.adapters.plan import PartitionPlan, StagePlan

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["plan_table", "print_plan"]


def plan_table(plan: PartitionPlan) -> Table:
    """Returns one row per stage: its ranks, its layers, its costs, and how full its ranks are."""
    from rich.table import Table  # here, as it takes a tenth of this package's import time

    costs = [stage.cost for stage in plan.stages]
    timed, sized = any(c.seconds for c in costs), any(c.activation_bytes for c in costs)
    table = Table(title=f"{plan.architecture} in {plan.num_partitions} stages")
    table.add_column("stage", justify="right")
    if plan.is_paired:
        table.add_column("ranks")
    table.add_column("layers")
    columns = ["parameters", *(["F ms", "I ms", "W ms"] if timed else [])]
    for name in [*columns, *(["activations MiB"] if sized else []), "ranks' load"]:
        table.add_column(name, justify="right")
    loads = [_weight(cost) for cost in costs]
    if plan.is_paired:
        loads = [a + b for a, b in zip(loads, reversed(loads), strict=True)]
    for index, stage in enumerate(plan.stages):
        pair = sorted((index, plan.num_partitions - 1 - index))
        ranks = ["{}, {}".format(*pair)] if plan.is_paired else []
        numbers = _numbers(stage.cost, timed, sized)
        load = f"{loads[index] / max(loads):.0%}" if max(loads) else "-"
        table.add_row(str(index), *ranks, _layers(plan, stage), *numbers, load)
    return table


def print_plan(plan: PartitionPlan) -> None:
    """Prints the table to the terminal."""
    from rich.console import Console

    Console().print(plan_table(plan))


def _weight(cost: Cost) -> float:
    return cost.seconds or float(cost.num_parameters)


def _numbers(cost: Cost, timed: bool, sized: bool) -> Sequence[str]:
    times = (cost.forward, cost.backward_input, cost.backward_weight) if timed else ()
    memory = (f"{cost.activation_bytes / 2**20:.2f}",) if sized else ()
    return (f"{cost.num_parameters:,}", *(f"{1e3 * t:.3f}" for t in times), *memory)


def _layers(plan: PartitionPlan, stage: StagePlan) -> str:
    parts = []
    if stage is plan.stages[0]:
        parts.append("all before")
    if stage.layers:
        first, last = stage.layers[0], stage.layers[-1]
        if first.rpartition(".")[0] == last.rpartition(".")[0]:
            last = last.rpartition(".")[2]
        names = first if len(stage.layers) == 1 else f"{first} to {last}"
        parts.append(f"{names} ({len(stage.layers)})")
    if stage is plan.stages[-1]:
        parts.append("all behind")
    return ", ".join(parts)
