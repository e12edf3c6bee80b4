"""Cuts a whole model into what each rank holds of it, and of each batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dualpipe_ext._handshake import agree
from dualpipe_ext._ranks import Ranks
from dualpipe_ext._replicas import ReplicaRanks
from dualpipe_ext._source import ScheduleSource
from dualpipe_ext.adapters import Cost, Partition, get_model_adapter
from dualpipe_ext.config import Balance, DualPipeConfig
from dualpipe_ext.groups import PipelineGroup
from dualpipe_ext.schedule import PlannerInfo, ScheduleError, schedules
from dualpipe_ext.training.rows import RowPlan

__all__ = ["OwnPart", "compare_settings", "measured_costs", "own_part", "planner_of"]


def planner_of(schedule: str) -> PlannerInfo:
    """Returns the planner of a schedule; raises ScheduleError if there is none of that name."""
    known = {info.name: info for info in schedules()}
    if schedule not in known:
        raise ScheduleError(f"{schedule!r} is no schedule; there are {', '.join(known)}")
    return known[schedule]


def _source(config: DualPipeConfig, num_ranks: int) -> ScheduleSource:
    """Returns the source of the configured schedule for these ranks.

    Raises:
        ValueError: it has another number of stages than is configured.
    """
    source = ScheduleSource.of(config.schedule, num_ranks, max(1, config.num_stages // num_ranks))
    num_stages = source.smallest().num_stages
    if config.num_stages not in (0, num_stages):
        raise ValueError(
            f"num_stages={config.num_stages}, but {config.schedule} on {num_ranks} ranks has "
            f"{num_stages} stages; configure num_stages={num_stages}, start another number of ranks, "
            f"or have pipelines side by side (mesh=, in Lightning DualPipeStrategy(num_stages="
            f"{config.num_stages}))"
        )
    return source


def compare_settings(
    model: nn.Module | Sequence[nn.Module],
    config: DualPipeConfig,
    group: PipelineGroup,
    replicas: ReplicaRanks,
) -> None:
    """Compares what models are cut by; all ranks of all replicas call it.

    Raises:
        ValueError: ranks or replicas differ in their settings, or in whether they are given a whole
            model; raised on all of them.
        PipelineError: another rank or replica cannot be reached.
    """
    settings = {name: value for name, value in config.to_dict().items() if name != "seed"}
    told = {**settings, "model to be cut": isinstance(model, nn.Module)}
    replicas.together(
        lambda: agree(group, config.timeout, lambda: {**told, "stages": {}}),
        "could not compare its settings",
    )
    _check_replicas(replicas.gather_objects(told))


def measured_costs(
    model: nn.Module | Sequence[nn.Module],
    config: DualPipeConfig,
    sample_inputs: Sequence[Tensor | None] | None,
    group: PipelineGroup,
    replicas: ReplicaRanks,
) -> list[Cost] | None:
    """Measures the costs of a model's parts, if it is to be cut by them; all ranks call it.

    Only the first rank of the first replica measures, as all have to cut the model alike.

    Args:
        model: as for :func:`own_part`.
        config: the same on every rank and replica.
        sample_inputs: one micro-batch of the model's inputs, to measure its layers with.
        group: the ranks.
        replicas: the ranks at the same position of other pipelines.

    Raises:
        Exception: what went wrong, on the first rank.
        PipelineError: the same, on the others.
    """
    if config.balance not in ("time", "memory") or not isinstance(model, nn.Module):
        return None
    failure = "could not measure its layers"
    ranks = Ranks(group, config.timeout)
    adapted = model

    def measure() -> list[Cost]:
        return get_model_adapter(adapted).measure(sample_inputs)

    return replicas.from_first(lambda: ranks.from_first(measure, failure), failure)


def _check_replicas(told: Sequence[dict[str, Any]]) -> None:
    for replica, found in enumerate(told):
        for name, expected in told[0].items():
            if found[name] != expected:
                raise ValueError(
                    f"replicas differ in {name}: {expected!r} for replica 0, {found[name]!r} for "
                    f"replica {replica}; configure all of them alike"
                )


@dataclass(frozen=True)
class OwnPart:
    """One rank's part of a model and of each batch.

    Attributes:
        stages: the stages of this rank, in the order of the pipeline's modules.
        rows: where the rows of a batch enter and leave.
    """

    stages: list[nn.Module]
    rows: RowPlan


def own_part(
    model: nn.Module | Sequence[nn.Module],
    config: DualPipeConfig,
    costs: list[Cost] | None,
    group: PipelineGroup,
    show: bool = True,
) -> OwnPart:
    """Cuts a model, and returns this rank's part.

    Args:
        model: a whole model; its partitions, all or at least this rank's; or this rank's stages.
        config: the same on every rank.
        costs: what :func:`measured_costs` returned.
        group: the ranks.
        show: print on the first rank how a whole model was cut.

    Raises:
        ValueError, TypeError: the model cannot be cut as configured, or is already cut otherwise.
    """
    source = _source(config, group.size)
    num_microbatches = config.num_microbatches or source.smallest().num_microbatches
    rows = RowPlan.of(source.plan(num_microbatches))
    schedule = source.smallest()
    stages = schedule.stages_of(group.rank)
    if isinstance(model, nn.Module):
        partitions = get_model_adapter(model).partition(
            schedule.num_stages,
            config.balance,
            costs=costs,
            paired=planner_of(config.schedule).placement != "loop",
            process_group=group,
            show=show,
        )
        return OwnPart([partitions[stage] for stage in stages], rows)
    given = list(model)
    if not config.evens_out:
        _check_cut(given, config.balance)
    by_index = {each.plan.index: each for each in given if isinstance(each, Partition)}
    if len(by_index) == len(given) and set(stages) <= set(by_index):
        return OwnPart([by_index[stage] for stage in stages], rows)
    return OwnPart(given, rows)


def _check_cut(given: Sequence[nn.Module], balance: Balance) -> None:
    """Raises if stages were not cut as configured."""
    sizes = {
        tuple(len(stage.layers) for stage in each.plan.stages)
        for each in given
        if isinstance(each, Partition)
    }
    if sizes != {balance}:
        raise ValueError(
            f"balance={list(balance)} says how to cut a whole model, and these are stages already, "
            f"cut otherwise; give the model, or leave balance out"
        )
