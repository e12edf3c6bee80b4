"""Saves what is needed to continue a training run."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualpipe_ext._advice import warn_caller
from dualpipe_ext._buffers import average_over
from dualpipe_ext._ranks import Ranks
from dualpipe_ext._replicas import ReplicaRanks
from dualpipe_ext.checkpoint import folders
from dualpipe_ext.checkpoint.holdings import Holding
from dualpipe_ext.checkpoint.integrity import Checksums, checksums_of
from dualpipe_ext.checkpoint.optimizers import (
    gather_shards,
    group_options,
    kind_of,
    optimizer_state,
)
from dualpipe_ext.checkpoint.random_state import random_state
from dualpipe_ext.checkpoint.storage import DESCRIPTION, FAILURE, Record, write_values
from dualpipe_ext.host_groups import TIMEOUT_S
from dualpipe_ext.pipeline import Pipeline

__all__ = ["save_checkpoint"]


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    *,
    step: int,
    scaler: GradScaler | None = None,
    extra: Any = None,
    keep: int | None = None,
    replicas: dist.ProcessGroup | None = None,
    timeout: float = TIMEOUT_S,
) -> Path:
    """Saves a model and its training to ``folder/step-<step>``, under the model's own names.

    Every rank calls it, and writes its own stages; of the two copies of a stage, the first one (on
    the rank with the stage's number) is saved. The checkpoint appears in its place once it is
    complete and on disk; until then, and if anything fails, the last one stays. Before that,
    buffers that have a mean, such as statistics of batch norms, are averaged over all copies of a
    stage, including replicas (:meth:`dualpipe_ext.Pipeline.sync_buffers`). If parameters differ
    between copies, it warns (:meth:`dualpipe_ext.Pipeline.check_copies`).

    Args:
        folder: a folder for only this run, on a file system that all ranks share; created if
            missing.
        model: a pipeline, or an unsplit model on one rank.
        optimizer: the optimizer of this rank's parameters.
        scheduler: the optimizer's scheduler; that of rank 0 is saved.
        step: the number of optimizer steps so far. A checkpoint of the same step is replaced.
        scaler: the loss scaler; that of rank 0 is saved.
        extra: anything else to save, such as the position in the data; that of rank 0 is saved, by
            pickling.
        keep: how many of the latest checkpoints to keep in the folder; by default all.
        replicas: the ranks that hold the same stages in other replicas of the pipeline (the ``dp``
            group of a device mesh), where everything but random numbers is the same. The first
            replica saves.
        timeout: seconds to wait for the slowest rank.

    Returns:
        The path of the checkpoint, on every rank. Its name ends in a further number if a checkpoint
        of this step was there already.

    Raises:
        ValueError, TypeError: an invalid ``step`` or ``keep``, before anything is changed; or a
            ``model`` that cannot be saved.
        Exception: what went wrong on this rank.
        PipelineError: another rank could not save, with its reason.
    """
    holding = Holding.of(model, timeout)
    others = ReplicaRanks(replicas)
    others.together(lambda: _check_all(holding, step, keep), FAILURE)
    others.together(lambda: _settle(holding), FAILURE)
    average_over(replicas, model.buffers())
    if optimizer is not None:
        gather_shards(optimizer)
    generators = others.gather_objects(random_state(holding.device))
    seeds = others.gather_objects(holding.seed)

    def save() -> Path:
        ranks = holding.ranks
        values: dict[str, Any] = {}

        def gather() -> None:
            values.update(_trained(holding, optimizer))
            values[f"random.{ranks.rank}"] = generators
            if ranks.is_first:
                values.update(_states(optimizer, scheduler, scaler), extra=extra)

        def finish(by_rank: list[dict[Record, int]]) -> Path:
            checksums = Checksums(dict(ChainMap(*by_rank)))
            facts = {**_facts(holding, optimizer, scheduler), "seeds": seeds}
            place = folders.commit(draft, step, {**facts, "checksums": checksums.write(draft)})
            folders.remove_old(place, keep)
            return place

        ranks.share(gather, FAILURE)
        draft = ranks.from_first(lambda: folders.begin(Path(folder)), FAILURE)
        try:
            own = write_values(ranks, draft, values)
            by_rank = ranks.share(lambda: _own_checksums(ranks, draft, own), FAILURE)
            return ranks.from_first(lambda: finish(by_rank), FAILURE)
        except BaseException:
            if ranks.is_first:
                folders.discard(draft)
            raise

    return others.from_first(save, FAILURE)


def _own_checksums(ranks: Ranks, draft: Path, own: list[Record]) -> dict[Record, int]:
    """Returns the checksums of what this rank wrote; on the first rank, also of the metadata."""
    if ranks.is_first:
        own = [*own, (DESCRIPTION, 0, (draft / DESCRIPTION).stat().st_size)]
    return checksums_of(draft, own)


def _settle(holding: Holding) -> None:
    """Makes the buffers of both copies equal, and raises what late messages failed with."""
    if holding.pipeline is not None:
        holding.pipeline.sync_buffers()
        holding.pipeline.synchronize()
        _warn_of_copies(holding.pipeline)


def _warn_of_copies(pipeline: Pipeline) -> None:
    """Warns if copies differ. It never raises: a run about to end is worth saving as it is."""
    try:
        pipeline.check_copies()
    except Exception as error:  # noqa: BLE001 - also what cannot be compared, or not in time
        if pipeline.rank == 0:
            warn_caller(
                f"the copies of stages were not found equal; those on the ranks of the stages' own "
                f"numbers are saved: {error}"
            )


def _check_all(holding: Holding, step: int, keep: int | None) -> None:
    """Checks what each rank was given, before anything is changed."""

    def check() -> None:
        _check(step, keep)
        holding.check_whole()

    holding.meet()
    holding.ranks.share_here(check, FAILURE)


def _check(step: int, keep: int | None) -> None:
    for name, value in (("step", step), ("keep", 1 if keep is None else keep)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: it must be an int")
    if step < 0:
        raise ValueError(f"step={step}: it must be a number of steps, 0 or more")
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: it must be at least 1, or None to keep all checkpoints")


def _trained(holding: Holding, optimizer: Optimizer | None) -> dict[str, Any]:
    """Returns what this rank saves of the model and its optimizer."""
    values = _by_key("model", holding.saved_state())
    if optimizer is not None:
        values |= _by_key("optimizer", optimizer_state(optimizer, holding))
    return values


def _by_key(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in values.items()}


def _states(
    optimizer: Optimizer | None, scheduler: LRScheduler | None, scaler: GradScaler | None
) -> dict[str, Any]:
    """Returns the states that are the same on all ranks."""
    given = {"scheduler": scheduler, "scaler": scaler}
    found: dict[str, Any] = {k: v.state_dict() for k, v in given.items() if v is not None}
    if optimizer is not None:
        found["groups"] = group_options(optimizer)
    return found


def _facts(
    holding: Holding, optimizer: Optimizer | None, scheduler: LRScheduler | None
) -> dict[str, Any]:
    return {
        "architecture": holding.architecture,
        "num_ranks": holding.ranks.group.size,
        "num_pipeline_steps": holding.pipeline.num_steps if holding.pipeline else 0,
        "optimizer": None if optimizer is None else kind_of(optimizer),
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "torch": torch.__version__,
    }
