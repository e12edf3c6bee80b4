"""Ranks that save small pipelines, and one that is cut off in it; processes import it by name."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from outcomes import Outcome, attempt
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from dualpipe_ext import DualPipe
from dualpipe_ext.checkpoint import load_checkpoint, save_checkpoint

WIDTH = 3


class Explosive:
    """Cannot be written: whoever tries has no space left, or dies."""

    def __init__(self, is_deadly: bool) -> None:
        self.is_deadly = is_deadly

    def __reduce__(self) -> Any:
        if self.is_deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device")


class Carrier(nn.Linear):
    """A stage with something besides tensors."""

    load: Any = "harmless"

    def get_extra_state(self) -> Any:
        return self.load

    def set_extra_state(self, state: Any) -> None:
        self.load = state


def make_pipeline(value: float, width: int = WIDTH, bias: bool = True) -> DualPipe:
    """Two equal stages, all weights of one value."""
    stages = [Carrier(width, width, bias), Carrier(width, width, bias)]
    for parameter in nn.ModuleList(stages).parameters():
        nn.init.constant_(parameter, value)
    return DualPipe(stages)


def save(rank: int, size: int, folder: Path, steps: list[int], options: dict[str, Any]) -> Path:
    """Checkpoints whose weights are their step."""
    for step in steps:
        place = save_checkpoint(folder, make_pipeline(step), step=step, **options)
    return place


def load(rank: int, size: int, folder: Path, width: int = WIDTH, bias: bool = True) -> float:
    pipeline = make_pipeline(-1.0, width, bias)
    load_checkpoint(folder, pipeline)
    (value,) = {float(x) for p in pipeline.parameters() for x in p.detach().flatten()}
    return value


def load_another(rank: int, size: int, folder: Path) -> tuple[Outcome, float]:
    """How it went, and what the weights are then."""
    pipeline = make_pipeline(-1.0, WIDTH + 1, bias=False)
    outcome = attempt(load_checkpoint, folder, pipeline)
    return outcome, float(next(pipeline.parameters()).detach().mean())


def save_cut_off(rank: int, size: int, folder: Path, on_rank: int, is_deadly: bool) -> Outcome:
    """Saves step 1, then step 2, in the middle of which a rank is cut off."""
    save(rank, size, folder, [1], {})
    pipeline = make_pipeline(2.0)
    if rank == on_rank:
        for module in pipeline.module:
            module.load = Explosive(is_deadly)  # type: ignore[assignment]
    return attempt(save_checkpoint, folder, pipeline, step=2, timeout=5.0)


def sharded(pipeline: DualPipe, replicas: dist.ProcessGroup) -> Optimizer:
    return ZeroRedundancyOptimizer(
        pipeline.parameters(), torch.optim.AdamW, process_group=replicas, lr=0.1
    )


def take_step(pipeline: DualPipe, optimizer: Optimizer, gradient: float) -> list[torch.Tensor]:
    """The parameters after it."""
    for parameter in pipeline.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return [parameter.detach().clone() for parameter in pipeline.parameters()]


def draw() -> list[float]:
    """A number of each generator."""
    return [float(torch.rand(())), random.random(), float(np.random.rand())]


def load_replicas(
    rank: int, folder: Path, pipeline: DualPipe, replicas: dist.ProcessGroup
) -> dict[str, Any]:
    """The second replica looks elsewhere; then one rank of it has another optimizer."""
    is_second = dist.get_rank(replicas) == 1
    elsewhere = folder / "of another run" if is_second else folder
    kind = torch.optim.SGD if rank == 3 else torch.optim.AdamW
    before = [parameter.detach().clone() for parameter in pipeline.parameters()]
    unloaded = attempt(
        load_checkpoint, folder, pipeline, kind(pipeline.parameters(), lr=0.1), replicas=replicas
    )
    parameters = zip(before, pipeline.parameters(), strict=True)
    is_unchanged = all(torch.equal(value, parameter) for value, parameter in parameters)
    return {
        "chosen": load_checkpoint(elsewhere, pipeline, replicas=replicas).path,
        "nowhere": attempt(load_checkpoint, folder / "empty", pipeline, replicas=replicas),
        "unloaded": unloaded,
        "unchanged": is_unchanged,
    }


def save_replicas(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Two replicas of two ranks: what each saves, loads and draws; then a save that fails."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    replicas = mesh.get_group("dp")
    pipeline = DualPipe([Carrier(2, 2), Carrier(2, 2)], process_group=mesh.get_group("pp"))
    for parameter in pipeline.parameters():
        nn.init.constant_(parameter, 1.0)
    optimizer = sharded(pipeline, replicas)
    take_step(pipeline, optimizer, 1.0)
    pipeline.module[0].register_buffer("mean", torch.tensor(float(rank)))
    pipeline.module[1].register_buffer("mean", torch.tensor(float(rank)))
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(rank)
    place = save_checkpoint(folder, pipeline, optimizer, step=1, replicas=replicas)
    drawn = draw()
    mean = {float(buffer) for buffer in pipeline.buffers()}
    wanted = take_step(pipeline, optimizer, 2.0)
    others = sharded(pipeline, replicas), torch.optim.AdamW(pipeline.parameters(), lr=0.5)
    went_on = []
    for other in others:
        resumed = load_checkpoint(folder, pipeline, other, replicas=replicas)
        drawn_again = draw()
        steps = zip(take_step(pipeline, other, 2.0), wanted, strict=True)
        went_on.append(all(torch.equal(found, value) for found, value in steps))
    found = {
        "place": place,
        "drawn": drawn,
        "drawn again": drawn_again,
        "knows": resumed.random_state,
        "alone knows": load_checkpoint(folder, pipeline).random_state,
        "went on": went_on,
        "mean": mean,
    }
    found |= load_replicas(rank, folder, pipeline, replicas)
    if rank == 2:  # the second rank of the first replica
        for module in pipeline.module:
            module.load = Explosive(is_deadly=False)  # type: ignore[assignment]
    found["failed"] = attempt(save_checkpoint, folder, pipeline, step=2, replicas=replicas)
    return found
