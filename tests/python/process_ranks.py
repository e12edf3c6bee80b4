"""What ranks do that are processes: sent to them by name, so they live in a module of their own."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # names the backend "fake"
from faults import fail_at
from mistakes import Call, make_mistake
from models import squared_error
from outcomes import Outcome, attempt
from parity import Job, own_batch, own_stages, run_rank
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dualpipe_ext.pipeline as pipeline_module
from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline, setup_dual_pipe
from dualpipe_ext._local_stages import LocalStages
from dualpipe_ext._replicas import ReplicaRanks
from dualpipe_ext.compat.ranks import TrainerRanks
from dualpipe_ext.host_groups import host_group
from dualpipe_ext.training.replicas import Replicas

SEED = {"seed": 7}
JOBS = {
    "attention": Job("attention", "dualpipe", 4, 10),
    "tied": Job("tied", "dualpipe", 4, 8, dtype=torch.float64, sync="within"),
    "many": Job("many", "dualpipe", 4, 8),
    "mixed": Job("mixed", "dualpipev", 4, 8),
    "autocast": Job("autocast", "dualpipe", 4, 8, sync="within"),
    "odd": Job("odd", "1f1b", 4, 8),
    "checkpoint": Job("checkpoint_reentrant", "zbv", 4, 8),
    "dropout": Job("dropout", "dualpipe", 4, 8, config=SEED),
    "dropout, summed within": Job("dropout", "dualpipe", 4, 10, sync="within", config=SEED),
    "dropout in a V": Job("dropout", "dualpipev", 4, 8, config=SEED),
    "dropout under 1f1b": Job("dropout", "1f1b", 4, 8, config=SEED),
    "dropout in checkpoints": Job("checkpoint_dropout", "dualpipe", 4, 8, config=SEED),
}
MISTAKES = [
    "odd number of micro-batches",
    "numbers of micro-batches that differ",
    "fewer rows than micro-batches",
    "no criterion",
    "labels on the wrong rank",
    "a criterion that does not reduce",
    "a shape that another rank cannot take",
]
PLACES = ["forward", "backward", "weight", "criterion"]


def unequal_modules(rank: int, num_ranks: int) -> Outcome:
    return attempt(DualPipe, [nn.Linear(3, 3), nn.Linear(3 + rank, 3)])


def run_in_place(place: int, job: Job, **group: Any) -> tuple[Pipeline, torch.Tensor | None]:
    """A step of the job in one place of a pipeline, and its losses."""
    pipeline = Pipeline(own_stages(job, place), job.schedule, **group)
    inputs, labels = own_batch(job.plan(), place, job.microbatches())
    loss, _ = pipeline.step(
        *inputs, num_chunks=job.num_chunks, criterion=squared_error, labels=labels
    )
    return pipeline, loss


def mapped(rank: int, num_ranks: int, job: Job) -> tuple[int, torch.Tensor | None]:
    """The job with the ranks of the group the other way round."""
    mapping = [num_ranks - 1 - r for r in range(num_ranks)]
    place = num_ranks - 1 - rank
    pipeline, loss = run_in_place(place, job, rank_mapping=np.array(mapping))
    return pipeline.rank, loss


def over_group_of_gpus(rank: int, group: dist.ProcessGroup, job: Job) -> dict[str, Any]:
    """The job on two pipelines over a group that carries nothing of the host's, as one of NCCL.

    Ranks have unequally many groups by then, as they do where first and last stages share weights.
    """
    if rank in (0, 3):
        dist.new_group([0, 3], use_local_synchronization=True)
    world = dist.group.WORLD
    assert world is not None
    (first, losses), (second, again) = (
        run_in_place(rank, job, process_group=group) for _ in range(2)
    )
    gathered: list[Any] = [None] * 4
    dist.all_gather_object(gathered, rank, group=TrainerRanks.of(group).host)
    return {
        "losses": [losses, again],
        "norms": [float(pipeline.clip_grad_norm_(1.0)) for pipeline in (first, second)],
        "replicas": Replicas(group).gather(float(rank)),
        "objects": [gathered, ReplicaRanks(group).gather_objects(rank)],
        "is made once": host_group(group) is host_group(group) is not group,
        "its own": host_group(world) is world,
    }


def over_groups_made_again(rank: int, num_ranks: int) -> list[float]:
    """Sums over two groups, one after the other: the second has the name of the first.

    Groups of torch's that connect nothing by themselves, as those of NCCL.
    """
    sums = []
    for number in range(2):
        group = dist.new_group([0, 1], backend="cuda:fake", use_local_synchronization=True)
        time.sleep(0.3 * number * rank)  # who comes first finds what is left in the store
        config = DualPipeConfig(timeout=(30.0, float("inf"))[number])
        pipeline = Pipeline([nn.Linear(2, 2)], "1f1b", process_group=group, config=config)
        sums.append(sum(x for (x,) in pipeline.group.all_gather_floats([float(rank)], 30.0)))
        dist.destroy_process_group(group)
    return sums


def gather_from_the_dead(rank: int, num_ranks: int, folder: str) -> None:
    """Over a group of GPUs alone; rank 1 is killed when all are connected."""
    group = dist.new_group(backend="cuda:gloo")
    ReplicaRanks(group).gather_objects(rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    outcome = attempt(ReplicaRanks(group).gather_objects, rank)
    Path(folder, str(rank)).write_text(f"{outcome.error}: {outcome.text}")


def lose_the_store(rank: int, num_ranks: int, port: int, folder: str) -> None:
    """Rank 0, which has the store, is killed; the others write what they are told of that."""
    meet_at(port, rank, num_ranks)
    pipeline = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    outcome = attempt(pipeline.group.all_gather, "", 5.0)
    Path(folder, str(rank)).write_text(f"{outcome.error}: {outcome.text}")


def stop_the_store(rank: int, num_ranks: int, port: int, folder: str) -> None:
    """Rank 0, which has the store, is stopped before a step; rank 1 is told, and ends it."""
    meet_at(port, rank, num_ranks)
    stages = [nn.Linear(4, 4), nn.Linear(4, 4)]
    pipeline = DualPipe(stages, config=DualPipeConfig(timeout=2.0))
    pids = pipeline.group.all_gather(str(os.getpid()), 30.0)
    knows = Path(folder, "rank 1 knows whom to end")
    if rank == 0:
        while not knows.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGSTOP)
    knows.touch()
    x = torch.ones(4, 4)
    outcome = attempt(pipeline.step, x, num_chunks=4, criterion=squared_error, labels=(x,))
    Path(folder, str(rank)).write_text(f"{outcome.seconds} {outcome.error}: {outcome.text}")
    os.kill(int(pids[0]), signal.SIGKILL)


def meet_at(port: int, rank: int, num_ranks: int) -> None:
    """A process group with a store in rank 0's process."""
    dist.destroy_process_group()
    address = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=num_ranks)


def clip_late(rank: int, num_ranks: int) -> list[Outcome]:
    """Twice; the first time the last rank comes only after the others have given up.

    Ranks that are processes do not try again, as their group is of no use then.
    """
    pipeline = Pipeline([nn.Linear(2, 2)], "1f1b", config=DualPipeConfig(timeout=2.0))
    for parameter in pipeline.parameters():
        parameter.grad = torch.full_like(parameter, rank + 1.0)
    if rank == num_ranks - 1:
        time.sleep(3.0)
    first = attempt(pipeline.clip_grad_norm_, 100.0)
    if not pipeline.group.are_threads:
        return [first, first]
    return [first, attempt(pipeline.clip_grad_norm_, 100.0)]


def fail_before_connecting(rank: int, group: dist.ProcessGroup) -> None:
    """Rank 0 fails at what it does with a transport that all have chosen."""
    with ExitStack() as changed:
        changed.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        chosen = patch.object(pipeline_module, "choose_transport", lambda _: ("host", "no reason"))
        changed.enter_context(chosen)
        if rank == 0:
            changed.enter_context(patch.object(LocalStages, "use_transport", _out_of_luck))
        Pipeline([nn.Linear(2, 2)], "1f1b", process_group=group)


def _out_of_luck(*_: object) -> None:
    raise RuntimeError("out of luck")


def everything(rank: int, num_ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: run_rank(rank, num_ranks, job) for name, job in JOBS.items()}
    for name in MISTAKES:
        found[name] = attempt(make_mistake, rank, num_ranks, name)
    for place in PLACES:
        found[f"fails in {place}"] = attempt(fail_at, rank, num_ranks, place, 2)
    found["unequal modules"] = unequal_modules(rank, num_ranks)
    found["mapped"] = mapped(rank, num_ranks, Job("bias", "dualpipev", num_ranks, 8))
    first, second = (dist.new_group(backend="cuda:gloo") for _ in range(2))
    found["group of GPUs"] = over_group_of_gpus(rank, first, Job("bias", "dualpipev", num_ranks, 8))
    found["fails before it connects"] = attempt(fail_before_connecting, rank, second)
    found["random numbers"] = draw_around_a_step(rank, num_ranks)
    mapping = [1, 0, 2, 3] if rank == 0 else None
    found["other mapping"] = attempt(DualPipe, [nn.Tanh(), nn.ReLU()], rank_mapping=mapping)
    found["wrong mapping"] = attempt(DualPipe, [nn.Tanh(), nn.ReLU()], rank_mapping=[0, 0, 1, 2])
    return found


def draw_around_a_step(rank: int, num_ranks: int) -> list[torch.Tensor]:
    """What a rank draws before a step that seeds its own random numbers, and after it."""
    stages = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)]
    pipeline = DualPipe(stages, config=DualPipeConfig(seed=7))
    ends = rank in (0, num_ranks - 1)
    x = torch.ones(8, 4) if ends else None
    torch.manual_seed(3)
    before = torch.rand(2)
    labels = (x,) if ends else None
    pipeline.step(x, num_chunks=2 * num_ranks, criterion=squared_error, labels=labels)
    return [before, torch.rand(2)]


def cut_wrapped(rank: int, num_ranks: int) -> Outcome:
    blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    return attempt(setup_dual_pipe, DistributedDataParallel(blocks), num_stages=2)


def say(rank: int, num_ranks: int) -> None:
    for file, number in ((sys.stdout, rank), (sys.stderr, 10 + rank)):
        file.write(f"{number}\n")  # at once: the other rank writes to the same place
        file.flush()


def stay_if_even(rank: int, num_ranks: int) -> None:
    if rank % 2 == 0:
        time.sleep(60.0)


class Dying(nn.Linear):
    """Kills its process in the n-th forward."""

    countdown = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Dying.countdown -= 1
        if Dying.countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        y: torch.Tensor = super().forward(x)
        return y


def die_in_a_step(rank: int, num_ranks: int, folder: str) -> None:
    """Rank 2 dies; the others write how their step went, and the one after it."""
    kind = Dying if rank == 2 else nn.Linear
    pipeline = DualPipe([kind(4, 4), kind(4, 4)], config=DualPipeConfig(timeout=5.0))
    ends = rank in (0, num_ranks - 1)
    x = torch.ones(8, 4) if ends else None
    keywords = {"num_chunks": 16, "criterion": squared_error, "labels": (x,) if ends else None}
    first = attempt(Call(rank, pipeline, (x,), keywords).run)
    second = attempt(Call(rank, pipeline, (x,), keywords).run)
    torch.save([dataclasses.asdict(first), dataclasses.asdict(second)], Path(folder, str(rank)))
