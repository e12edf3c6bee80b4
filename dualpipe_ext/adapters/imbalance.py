"""Finds uneven stages by the times of a training step, and the layer to move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from dualpipe_ext._handshake import collect
from dualpipe_ext.adapters.balance import step_seconds
from dualpipe_ext.adapters.cost import Cost
from dualpipe_ext.adapters.partition import Partition
from dualpipe_ext.adapters.plan import PartitionPlan
from dualpipe_ext.schedule import parse_action

if TYPE_CHECKING:  # pipeline.py imports adapters, too
    from dualpipe_ext.pipeline import Pipeline

__all__ = ["Imbalance", "report_imbalance"]


@dataclass(frozen=True)
class Imbalance:
    """How long the stages of a pipeline took in a step, and what would make the step shorter.

    Attributes:
        stages: mean seconds of F, I and W for one micro-batch, by stage.
        slowest: the stage that takes longest.
        sizes: how many layers each stage has.
        better_sizes: the same with one layer moved, for ``partition(balance=better_sizes)``; equal
            to ``sizes`` if no move helps.
        layer: the layer to move; ``None`` if no move helps.
        gain: the share by which the simulated step becomes shorter.
        text: all of this in a sentence or two.
    """

    stages: tuple[Cost, ...]
    slowest: int
    sizes: tuple[int, ...]
    better_sizes: tuple[int, ...]
    layer: str | None
    gain: float
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Move:
    layer: str
    seconds: float  # of the simulated step, were it moved
    sizes: tuple[int, ...]


def report_imbalance(pipeline: Pipeline, threshold: float = 0.02) -> Imbalance:
    """Reports, from the last step of a DualPipe of partitions, which layer to move where.

    A layer's share of its stage is taken from the plan
    (:meth:`dualpipe_ext.adapters.PartitionPlan.share_of`). Call it on every rank, after a training
    step; all get the same report. For stages on a GPU, that step must be timed by the GPU's clock.

    Args:
        pipeline: a pipeline whose modules are partitions.
        threshold: moves that shorten the simulated step by less than this share are not suggested.

    Raises:
        ValueError: the pipeline is not a DualPipe of partitions, no training step has run, or the
            host timed the step of stages on a GPU.
    """
    plan = _plan_of(pipeline)
    stages = _measured(pipeline)
    slowest = max(range(len(stages)), key=lambda s: stages[s].seconds)
    sizes = tuple(len(stage.layers) for stage in plan.stages)
    now = step_seconds(stages, _num_microbatches(plan))
    best = min(_moves(plan, stages), key=lambda move: move.seconds, default=None)
    if best is None or best.seconds > (1 - threshold) * now:
        text = f"{_describe(stages, slowest)}; moving one layer would not help"
        return Imbalance(tuple(stages), slowest, sizes, sizes, None, 0.0, text)
    gain = 1 - best.seconds / now
    text = (
        f"{_describe(stages, slowest)}; move {best.layer}: balance={list(best.sizes)} in place of "
        f"{list(sizes)} makes the simulated step {gain:.0%} shorter"
    )
    return Imbalance(tuple(stages), slowest, sizes, best.sizes, best.layer, gain, text)


def _plan_of(pipeline: Pipeline) -> PartitionPlan:
    partition = next(iter(pipeline.module))
    if not isinstance(partition, Partition) or not pipeline.is_mirrored:
        raise ValueError(
            "report_imbalance() is for a DualPipe whose modules are partitions of an adapter; "
            "this pipeline has other modules or another schedule"
        )
    return partition.plan


def _measured(pipeline: Pipeline) -> list[Cost]:
    """Returns the mean times of each stage's actions, over both of its copies."""
    told = collect(
        pipeline.group,
        pipeline.config.timeout,
        lambda: {"issued": _is_issue(pipeline), "seconds": _own_seconds(pipeline)},
        "could not time its stages",
    )
    if any(facts["issued"] for facts in told):
        raise ValueError(
            "the last step was timed by the host, which knows when it issued a GPU's work and not "
            "how long that took: set pipeline.times_device = True on all ranks before the step (it "
            "needs the extension with CUDA, see python -m dualpipe_ext info)"
        )
    sums = [sum(column) for column in zip(*(facts["seconds"] for facts in told), strict=True)]
    rows = [sums[i : i + 4] for i in range(0, len(sums), 4)]
    if any(backward == 0 or count == 0 for _, backward, _, count in rows):
        raise ValueError("there was no training step yet; call report_imbalance() after step()")
    return [Cost(f / n, i / n, w / n) for f, i, w, n in rows]


def _is_issue(pipeline: Pipeline) -> bool:
    """Whether the last trace says when work was issued, not how long it took."""
    on_gpu = any(parameter.is_cuda for parameter in pipeline.parameters())
    return on_gpu and bool(pipeline.last_trace) and pipeline.stats().clock == "host"


def _own_seconds(pipeline: Pipeline) -> list[float]:
    """Returns seconds of F, I and W and the number of F on this rank, stage after stage."""
    totals = [[0.0] * 4 for _ in range(pipeline.num_stages)]
    for event in pipeline.last_trace:
        for part in parse_action(event.action):
            seconds = event.end - event.start - event.wait
            totals[part.stage]["FIW".index("I" if part.op == "B" else part.op)] += seconds
            totals[part.stage][3] += part.op == "F"
    return [value for row in totals for value in row]


def _moves(plan: PartitionPlan, stages: Sequence[Cost]) -> list[_Move]:
    """Returns all ways to move one layer across a border between two stages."""
    borders = list(pairwise(range(len(stages))))
    ways = [(a, b, -1) for a, b in borders] + [(b, a, 0) for a, b in borders]
    return [
        _move(plan, stages, source, target, end)
        for source, target, end in ways
        if len(plan.stages[source].layers) > (source not in (0, len(stages) - 1))
    ]


def _move(plan: PartitionPlan, stages: Sequence[Cost], source: int, target: int, end: int) -> _Move:
    layer = plan.stages[source].layers[end]
    share = plan.share_of(layer)
    moved = list(stages)
    moved[source] = stages[source].scaled(1 - share)
    moved[target] = stages[target] + stages[source].scaled(share)
    sizes = [len(stage.layers) for stage in plan.stages]
    sizes[source] -= 1
    sizes[target] += 1
    return _Move(layer, step_seconds(moved, _num_microbatches(plan)), tuple(sizes))


def _num_microbatches(plan: PartitionPlan) -> int:
    return 3 * plan.num_partitions


def _describe(stages: Sequence[Cost], slowest: int) -> str:
    mean = sum(cost.seconds for cost in stages) / len(stages)
    seconds = stages[slowest].seconds
    return (
        f"stage {slowest} is the slowest: {1e3 * seconds:.2f} ms for a micro-batch, "
        f"{seconds / mean:.2f} times the mean of {len(stages)} stages"
    )
