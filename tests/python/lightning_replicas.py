"""Lightning's trainer over pipelines side by side, as processes: two of two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning_runs import (
    Noisy,
    Run,
    Split,
    full_disk,
    make_loader,
    make_trainer,
    out_of_luck,
    run_over_pipeline,
    start_as_torchrun,
)
from outcomes import Outcome, attempt
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, DistributedSampler

from dualpipe_ext import DualPipeConfig
from dualpipe_ext.compat import DualPipeStrategy

STAGES = 2


class Unlucky(Split):
    """The optimizer of the second replica's first rank raises."""

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        if dist.get_rank() == STAGES:
            found["optimizer"].register_step_pre_hook(out_of_luck)
        return found


class Normed(Split):
    """Has a batch norm, whose statistics each copy takes of its own rows."""

    def __init__(self, num_chunks: int) -> None:
        super().__init__(num_chunks)
        self.model.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))


class Sharded(Split):
    """The state of its optimizer is divided among the replicas."""

    def configure_optimizers(self) -> Any:
        built = self.dualpipe_wrapper
        parameters = list(built.local_module.parameters())
        group = built.ranks.replicas.group
        return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, group, lr=0.1)


def run_all(rank: int, size: int, jobs: dict[str, Run]) -> dict[str, Any]:
    """All runs on one rank; then what is told to all of them, or refused."""
    start_as_torchrun(rank, size)
    found: dict[str, Any] = {
        name: run_over_pipeline(size, job, STAGES) for name, job in jobs.items()
    }
    noisy = Noisy(2 * STAGES)
    fit(size, noisy)
    found["seed"] = noisy.dualpipe_wrapper.pipeline.config.seed
    found["normed"] = scores_within_and_after(size)
    found["unsaved"] = save_to_a_full_disk(rank, size)
    found["not updated"] = attempt(fit, size, Unlucky(2 * STAGES))
    found["other batches"] = other_batches(rank, size)
    return {**found, **refused(size)}


def strategy(num_stages: int = STAGES) -> dict[str, Any]:
    return {"strategy": DualPipeStrategy(num_stages=num_stages)}


def fit(size: int, module: Any, loader: Any = None, num_stages: int = STAGES) -> None:
    """One epoch, of one batch unless a loader is given."""
    trainer = make_trainer(Run(), [], devices=size, **strategy(num_stages))
    trainer.fit_loop.max_epochs = 1
    trainer.fit(module, loader or make_loader(8, 0, False))


def scores_within_and_after(size: int) -> list[float]:
    """Of the validation at the end of training, and of another one after it."""
    module, data = Normed(2 * STAGES), make_loader(16, 0, False).dataset
    trainer = make_trainer(Run(), [], devices=size, **strategy())
    trainer.fit_loop.max_epochs = 1
    loader = DataLoader(data, 16)
    trainer.fit(module, loader, loader)
    within = float(trainer.callback_metrics["val_loss"])
    (after,) = trainer.validate(module, loader, verbose=False)
    return [within, after["val_loss"]]


def fit_twice(size: int) -> None:
    """Over replicas, then over one pipeline."""
    module = Split(2 * STAGES)
    fit(size, module)
    fit(size, module, num_stages=0)


def save_to_a_full_disk(rank: int, size: int) -> Outcome:
    """The first rank of all cannot write."""
    trainer = make_trainer(Run(), [], devices=size, **strategy())
    trainer.fit(Split(2 * STAGES), make_loader(8, 0, False))
    if rank == 0:
        trainer.strategy.checkpoint_io.save_checkpoint = full_disk
    return attempt(trainer.save_checkpoint, "unsaved.ckpt")


def other_batches(rank: int, size: int) -> list[Outcome]:
    """Each replica reads its own data, in training and for predictions."""
    data = make_loader(16, 0, False).dataset
    sampler: DistributedSampler[Any] = DistributedSampler(
        data, num_replicas=size // STAGES, rank=rank // STAGES
    )
    loader = DataLoader(data, 8, sampler=sampler)
    trainer = make_trainer(Run(), [], devices=size, **strategy())
    return [
        attempt(fit, size, Split(2 * STAGES), loader),
        attempt(trainer.predict, Split(2 * STAGES), loader),
    ]


def refused(size: int) -> dict[str, Outcome]:
    """What cannot be done, by what the error says."""
    cases: dict[str, Callable[[], Any]] = {
        "DualPipeStrategy(num_stages=3) has pipelines of 3 ranks, and Trainer starts 4": (
            lambda: fit(size, Split(6), num_stages=3)
        ),
        "the module was cut into 2 stages by an earlier trainer": lambda: fit_twice(size),
        "in Lightning DualPipeStrategy(num_stages=2)": lambda: fit(
            size, with_config(num_stages=2), num_stages=0
        ),
        "has its state in shards": lambda: fit(size, Sharded(2 * STAGES)),
    }
    return {text: attempt(act) for text, act in cases.items()}


def with_config(**settings: Any) -> Split:
    module = Split(2 * STAGES)
    module._config = DualPipeConfig(**settings)
    return module
