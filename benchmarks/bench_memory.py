"""Resident memory of all ranks over many training steps, which must stay flat."""

import os
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from common import JsonOption, Result, on_ranks, write_json
from torch import Tensor, nn

from dualpipe_ext import DualPipe

WIDTH = 64


def resident_bytes() -> int:
    """Returns this process's resident set size."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error."""
    return nn.functional.mse_loss(output, target)


def measure(rank: int, num_ranks: int, steps: int, every: int) -> list[int]:
    """Trains on one rank; returns the total resident bytes of all ranks, every ``every`` steps."""
    stages = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in "01"
    ]
    model = DualPipe(stages)
    model.sync_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    is_end = rank in (0, num_ranks - 1)
    data = torch.randn(4 * num_ranks, WIDTH) if is_end else None
    curve = []
    for step in range(1, steps + 1):
        model.step(
            data, num_chunks=2 * num_ranks, criterion=loss_fn, labels=(data,), sync_gradients=True
        )
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            total = torch.tensor(resident_bytes())
            dist.all_reduce(total)
            curve.append(int(total))
    return curve


def main(
    ranks: Annotated[int, typer.Option(help="Number of ranks.")] = 4,
    steps: Annotated[int, typer.Option(min=200, help="Training steps.")] = 2000,
    every: Annotated[int, typer.Option(min=1, help="Steps between two looks.")] = 50,
    json: JsonOption = None,
) -> None:
    """Print the curve of resident memory and how far it moves after the first 100 steps."""
    curve = on_ranks(measure, ranks, steps, every)
    widest = max(curve)
    for index, size in enumerate(curve, start=1):
        print(f"{index * every:6d}  {size / 2**20:8.1f} MiB  {'#' * round(60 * size / widest)}")
    settled = curve[-(-100 // every) - 1 :]
    growth = max(settled) / settled[0] - 1
    print(f"after the first 100 steps: at most {growth:+.2%} (limit 2 %)")
    facts = {"growth": growth, "ranks": ranks, "steps": steps}
    result = Result("resident MiB", [size / 2**20 for size in curve], facts)
    write_json(json, "memory", {"curve": [result]})
    raise typer.Exit(growth > 0.02)


if __name__ == "__main__":
    typer.run(main)
