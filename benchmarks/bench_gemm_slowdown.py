"""How much slower a large matrix product is while messages leave the rank that computes it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from common import (
    DeviceOption,
    JsonOption,
    RepeatsOption,
    Report,
    Row,
    attempt,
    row_of,
    show_rows,
)
from message_flow import Flow, engine_seconds
from places import Mark, Place, engine_config, place_of
from thread_ranks import StartLine, in_threads
from torch import Tensor, nn

from dualpipe_ext import Pipeline

MOST_BYTES = 4 << 30


class Product(nn.Module):
    """Multiplies, timed by the device, and returns a message that is always the same.

    Args:
        place: where to run.
        size: the number of rows and columns of both matrices; bf16 on a GPU.
        num_bytes: the size of the message.
    """

    def __init__(self, place: Place, size: int, num_bytes: int) -> None:
        super().__init__()
        dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
        self.place = place
        self.weight = nn.Parameter(torch.randn(size, size, dtype=dtype, device=place.device))
        self.other = torch.randn(size, size, dtype=dtype, device=place.device)
        self.product = torch.empty_like(self.other)
        self.message = torch.zeros(num_bytes // 4, device=place.device)
        self.spans: list[tuple[Mark, Mark]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies, and returns the message."""
        start = self.place.mark()
        torch.mm(self.weight.detach(), self.other, out=self.product)
        self.spans.append((start, self.place.mark()))
        return self.message.detach()

    def seconds(self, count: int) -> list[float]:
        """Returns how long the last ``count`` products took, except the first two and the last one.

        The first two run before any message flows, and the last one when some have already left.
        """
        self.place.finish()
        spans = self.spans[-count:][2:-1]
        self.spans.clear()
        return [self.place.seconds(*span) for span in spans]


class Taker(nn.Module):
    """Takes messages and does nothing."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device=place.device))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x``."""
        return x


@dataclass(frozen=True)
class Load:
    """What flows during products; ``num_bytes`` is such that a message takes longer than one."""

    place: Place
    transport: str
    max_ctas: int
    size: int
    num_bytes: int
    num_products: int
    repeats: int


def measure(
    rank: int, num_ranks: int, start_line: StartLine, load: Load
) -> tuple[list[float], list[float]]:
    """Multiplies on rank 0, in turns alone and while messages flow; returns the times of both."""
    place, count = load.place, load.num_products
    config = engine_config(load.transport, nccl_max_ctas=load.max_ctas)
    stage = Taker(place) if rank else Product(place, load.size, load.num_bytes)
    pipeline = Pipeline([stage], "gpipe", config=config)
    batch = torch.zeros(count, 1, device=place.device) if rank == 0 else None
    alone: list[float] = []
    beside: list[float] = []
    for turn in range(load.repeats + 1):
        with torch.no_grad():
            start_line.wait()
            if isinstance(stage, Product):
                for _ in range(count):
                    stage(stage.message)
                seconds = stage.seconds(count)
                alone += seconds if turn else []
            start_line.wait()
            pipeline.step(batch, num_chunks=count)
            place.finish()
            if isinstance(stage, Product):
                seconds = stage.seconds(count)
                beside += seconds if turn else []
    return alone, beside


def slowdown(found: tuple[list[float], list[float]]) -> float:
    """Returns the median time of a product beside messages over that of one alone."""
    alone, beside = found
    return statistics.median(beside) / statistics.median(alone)


def describe(found: tuple[list[float], list[float]]) -> str:
    """Returns both times as text."""
    alone, beside = (statistics.median(lengths) * 1e3 for lengths in found)
    return f"{beside:.3f} ms, alone {alone:.3f} ms"


def product_seconds(place: Place, size: int) -> float:
    """Returns the time of a product with nothing beside it."""
    product = Product(place, size, 4)
    with torch.no_grad():
        for _ in range(8):
            product(product.message)
    return statistics.median(product.seconds(8))


def load_of(
    place: Place, transport: str, max_ctas: int, size: int, num_products: int, repeats: int
) -> Load:
    """Chooses a message that takes as long as one and a half products."""
    probe_bytes = 64 << 20 if place.device.type == "cuda" else 1 << 20
    probe = Flow(place, transport, probe_bytes, repeats=3, max_ctas=max_ctas)
    rate = probe.num_bytes / engine_seconds(probe)
    wanted = 1.5 * product_seconds(place, size) * rate
    most = min(MOST_BYTES, place.free_bytes() / 16)
    num_bytes = round(min(wanted, most) / 1024) * 1024
    return Load(place, transport, max_ctas, size, max(num_bytes, 1024), num_products, repeats)


def row_of_load(
    place: Place, transport: str, max_ctas: int, size: int, num_products: int, repeats: int
) -> Row:
    """Measures one way of sending; returns its row."""
    title = transport if transport != "nccl" else f"nccl, {max_ctas or 'as many as it likes'} CTAs"

    def run() -> tuple[tuple[list[float], list[float]], Load]:
        load = load_of(place, transport, max_ctas, size, num_products, repeats)
        return in_threads(measure, 2, load)[0], load

    found = attempt(run)
    return row_of(
        f"{title}: product beside messages over product alone",
        found,
        lambda both: slowdown(both[0]),
        lambda both: f"{describe(both[0])}; messages of {both[1].num_bytes / 2**20:.0f} MiB",
    )


def main(
    size: Annotated[int, typer.Option(help="Rows and columns of the matrices.")] = 8192,
    products: Annotated[int, typer.Option(min=6, help="Products of a step.")] = 16,
    repeats: RepeatsOption = 5,
    device: DeviceOption = "cuda",
    json: JsonOption = None,
) -> None:
    """Measure what messages take from computation, over each transport; reported, without a goal."""
    place = place_of(device)
    ways = [
        (transport, ctas)
        for transport in place.transports
        for ctas in ((1, 4, 16, 0) if transport == "nccl" else (0,))
    ]
    report = Report("gemm_slowdown", json, place.machine())
    for way in ways:
        report.add([row_of_load(place, *way, size, products, repeats)])
    show_rows(f"products of {size} x {size} matrices", report.rows)


if __name__ == "__main__":
    typer.run(main)
