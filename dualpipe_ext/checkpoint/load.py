"""Loads a checkpoint on any number of ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualpipe_ext._replicas import ReplicaRanks
from dualpipe_ext.checkpoint.compare import check_architecture
from dualpipe_ext.checkpoint.folders import find_checkpoint, read_manifest
from dualpipe_ext.checkpoint.holdings import Holding, Shapes
from dualpipe_ext.checkpoint.integrity import check_files
from dualpipe_ext.checkpoint.restore import Run, State, apply_state, read_state
from dualpipe_ext.checkpoint.saved import Saved
from dualpipe_ext.host_groups import TIMEOUT_S

__all__ = ["Resumed", "load_checkpoint"]

_FAILURE = "could not load the checkpoint"


@dataclass(frozen=True)
class Resumed:
    """What a loaded checkpoint tells the training loop.

    Attributes:
        path: the folder of the checkpoint.
        step: the ``step`` that was saved.
        extra: the ``extra`` that was saved.
        random_state: whether the states of random number generators were restored. They are if the
            numbers of ranks and of replicas are those that saved; otherwise they are left alone. A
            pipeline that has a seed (``DualPipeConfig.seed``) takes the one saved for its replica,
            if there is one, in either case.
    """

    path: Path
    step: int
    extra: Any
    random_state: bool


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    *,
    scaler: GradScaler | None = None,
    replicas: dist.ProcessGroup | None = None,
    timeout: float = TIMEOUT_S,
) -> Resumed:
    """Loads what :func:`save_checkpoint` saved, on any number of ranks or into an unsplit model.

    Every rank calls it, and reads its own stages, both copies of each. Everything is read and
    checked on all ranks of all replicas before anything is changed. Checkpoints are partly pickled:
    load only those whose origin you trust.

    Args:
        path: a checkpoint, or a folder of them, of which the latest complete one is loaded.
        model: a pipeline, or an unsplit model.
        optimizer: the optimizer of this rank's parameters, made as in the run that saved. If it is
            omitted, the checkpoint's is not loaded; the same holds for ``scheduler`` and
            ``scaler``.
        scheduler: the optimizer's scheduler.
        scaler: the loss scaler.
        replicas: as for :func:`save_checkpoint`; the first replica chooses the checkpoint, and each
            reads it for itself.
        timeout: seconds to wait for the slowest rank.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: on every rank, the checkpoint is of another architecture or optimizer, or lacks
            what was requested; or, on the ranks that read them, its bytes are not those that were
            written.
        PipelineError: another rank could not load, with its reason.
    """
    holding = Holding.of(model, timeout)
    ranks = holding.ranks
    others = ReplicaRanks(replicas)
    others.together(holding.meet, _FAILURE)
    place = others.from_first(
        lambda: ranks.from_first(lambda: find_checkpoint(path), _FAILURE), _FAILURE
    )
    run = Run(holding, optimizer, scheduler, scaler, replicas)

    def read() -> tuple[Saved, State]:
        saved = _open(place, holding)
        return saved, ranks.share_here(lambda: read_state(saved, run), _FAILURE)

    saved, state = others.together(read, _FAILURE)
    others.together(lambda: ranks.share_here(lambda: apply_state(state, run), _FAILURE), _FAILURE)
    return Resumed(place, saved.manifest["step"], state.extra, state.generators is not None)


def _open(place: Path, holding: Holding) -> Saved:
    """Opens a checkpoint and checks that it fits the model; every rank calls it."""
    ranks = holding.ranks
    found: list[Saved] = []

    def describe() -> dict[int, Shapes]:
        holding.check_whole()
        if ranks.is_first:
            check_files(place, read_manifest(place)["files"])
        found.append(Saved.at(place))
        return holding.shapes()

    by_rank = ranks.share(describe, _FAILURE)
    (saved,) = found
    by_stage = {stage: shapes for own in by_rank for stage, shapes in own.items()}
    check_architecture(saved, _in_order(by_stage), holding.architecture)
    return saved


def _in_order(by_stage: dict[int, Shapes]) -> Shapes:
    return {name: by_stage[s][name] for s in sorted(by_stage) for name in by_stage[s]}
