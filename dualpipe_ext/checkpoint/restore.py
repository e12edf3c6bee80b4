"""Restores a run from a checkpoint: everything is read first, and only then applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualpipe_ext._replicas import ReplicaRanks
from dualpipe_ext.checkpoint.holdings import Holding
from dualpipe_ext.checkpoint.optimizers import OptimizerKeys, kind_of, restored_state
from dualpipe_ext.checkpoint.random_state import set_random_state
from dualpipe_ext.checkpoint.saved import Saved

__all__ = ["Run", "State", "apply_state", "read_state"]


@dataclass(frozen=True)
class Run:
    """One rank's part of a training run, into which a checkpoint is loaded."""

    holding: Holding
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    scaler: GradScaler | None
    replicas: dist.ProcessGroup | None


@dataclass(frozen=True)
class State:
    """What was read for one rank; ``None`` for what was not requested.

    Attributes:
        num_pipeline_steps: the number of steps of the pipeline that saved.
        seed: the seed of its random numbers, such as dropout's.
        generators: the states of random number generators; ``None`` if the number of ranks or of
            replicas differs.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    scaler: dict[str, Any] | None
    extra: Any
    num_pipeline_steps: int
    seed: int | None
    generators: dict[str, Any] | None


def read_state(saved: Saved, run: Run) -> State:
    """Reads what a rank needs; nothing is changed.

    Raises:
        ValueError: something is not in the checkpoint, or does not fit the run.
    """
    _check_optimizer(saved, run.optimizer)
    _check_scheduler(saved, run.scheduler)
    scheduler = None if run.scheduler is None else saved.read_one("scheduler")
    _check_groups(scheduler, run.optimizer)
    return State(
        model=saved.read("model", run.holding.state_names()),
        optimizer=None if run.optimizer is None else _read_optimizer(saved, run, run.optimizer),
        scheduler=scheduler,
        scaler=None if run.scaler is None else saved.read_one("scaler"),
        extra=saved.read_one("extra"),
        num_pipeline_steps=saved.manifest["num_pipeline_steps"],
        seed=_read_seed(saved, run),
        generators=_read_generators(saved, run),
    )


def apply_state(state: State, run: Run) -> None:
    """Loads what was read into the run."""
    for piece in run.holding.pieces:
        piece.load(state.model)
    for owner, values in (
        (run.optimizer, state.optimizer),
        (run.scheduler, state.scheduler),
        (run.scaler, state.scaler),
    ):
        if owner is not None:
            owner.load_state_dict(values)  # type: ignore[arg-type]
    if state.generators is not None:
        set_random_state(state.generators, run.holding.device)
    if run.holding.pipeline is not None:
        run.holding.pipeline.resume_at(state.num_pipeline_steps, seed=state.seed)


def _read_optimizer(saved: Saved, run: Run, optimizer: Optimizer) -> dict[str, Any]:
    keys = OptimizerKeys(saved.keys("optimizer"), run.holding)
    values = saved.read("optimizer", keys.all())
    return restored_state(optimizer, run.holding, keys, values, saved.read_one("groups"))


def _read_seed(saved: Saved, run: Run) -> int | None:
    """Returns the seed of this replica; ``None`` if fewer replicas saved theirs."""
    seeds: list[int | None] = saved.manifest.get("seeds", [])
    replica = ReplicaRanks(run.replicas).index
    return seeds[replica] if replica < len(seeds) else None


def _read_generators(saved: Saved, run: Run) -> dict[str, Any] | None:
    """Returns this rank's generator states; ``None`` if numbers of ranks or replicas differ."""
    ranks, replicas = run.holding.ranks, run.replicas
    if saved.manifest["num_ranks"] != ranks.group.size:
        return None
    by_replica: list[dict[str, Any]] = saved.read_one(f"random.{ranks.rank}")
    if len(by_replica) != (1 if replicas is None else replicas.size()):
        return None
    return by_replica[ReplicaRanks(replicas).index]


def _check_optimizer(saved: Saved, optimizer: Optimizer | None) -> None:
    if optimizer is None:
        return
    there, here = saved.manifest["optimizer"], kind_of(optimizer)
    if there != here:
        raise ValueError(
            f"{saved.place} was saved {f'with the optimizer {there}' if there else 'without one'}, "
            f"and the optimizer here is {here}; make the same one, or load without optimizer= and "
            f"scheduler= to begin with a new one"
        )


def _check_scheduler(saved: Saved, scheduler: LRScheduler | None) -> None:
    there = saved.manifest.get("scheduler")  # checkpoints did not always say
    if scheduler is None or there is None:
        return
    here = type(scheduler).__name__
    if there != here:
        raise ValueError(
            f"{saved.place} was saved with the scheduler {there}, and the scheduler here is {here}; "
            f"make the same one, or begin with a new one: dualpipe_ext.checkpoint.load_checkpoint() "
            f"without scheduler="
        )


def _check_groups(scheduler: dict[str, Any] | None, optimizer: Optimizer | None) -> None:
    if scheduler is None or optimizer is None or "base_lrs" not in scheduler:
        return
    there, here = len(scheduler["base_lrs"]), len(optimizer.param_groups)
    if there != here:
        raise ValueError(
            f"the scheduler was saved for {there} groups of parameters, and the optimizer of this "
            f"rank has {here}; make as many groups on every rank, empty ones as well"
        )
