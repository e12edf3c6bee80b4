"""Two small steps on two ranks, for tools that slow everything down (compute-sanitizer)."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from common import DeviceOption
from places import engine_config, place_of
from torch import Tensor, nn

from dualpipe_ext import DualPipe
from dualpipe_ext.testing import run_ranks

WIDTH = 64
CHUNKS = 4


def losses(rank: int, num_ranks: int, device: torch.device, transport: str) -> Tensor | None:
    """Runs steps on one rank; returns the losses of the last one."""
    config = engine_config(transport, timeout=60.0)  # tools are slow
    model = DualPipe([stage(index, device) for index in (rank, 1 - rank)], config=config)
    x = torch.ones(CHUNKS // 2, WIDTH, device=device)
    for _ in range(2):
        loss, _ = model.step(x, num_chunks=CHUNKS, criterion=mean, labels=(x,))
    return loss


def stage(index: int, device: torch.device) -> nn.Linear:
    """Returns a stage that multiplies by 2 (stage 0) or 3 (stage 1)."""
    made = nn.Linear(WIDTH, WIDTH, bias=False, device=device)
    nn.init.eye_(made.weight)
    with torch.no_grad():
        made.weight.mul_(index + 2)
    return made


def mean(output: Tensor, target: Tensor) -> Tensor:
    """Returns the product of both means."""
    return output.mean() * target.mean()


def main(
    transport: Annotated[str, typer.Option(help="What messages travel over.")] = "",
    device: DeviceOption = "cuda",
) -> None:
    """Run the steps and check their losses, which are 6."""
    place = place_of(device)
    for name in [transport] if transport else place.transports:
        for found in run_ranks(losses, 2, args=(place.device, name)):
            assert found.tolist() == [6.0] * (CHUNKS // 2), found
        print(f"{name}: fine")


if __name__ == "__main__":
    typer.run(main)
