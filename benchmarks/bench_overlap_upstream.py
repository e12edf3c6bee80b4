"""What bench_overlap.py measures, beside upstream: on two processes that share the device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from bench_overlap import Sizes, describe, sizes_of, visible
from common import (
    Contender,
    DeviceOption,
    JsonOption,
    RepeatsOption,
    Report,
    Result,
    Row,
    attempt,
    on_ranks,
    row_of,
    show_rows,
    take_turns,
)
from contenders import Work, bidirectional_step, ours_model
from peers import build_upstream, join_with_nccl, load_upstream
from places import Place, place_of


def measure_process(
    rank: int, num_ranks: int, sizes: Sizes, checkout: Path, folder: str, repeats: int
) -> list[Result]:
    """Times our steps and upstream's with both sizes, in turns, on a rank that is a process."""
    if sizes.large.place.device.type == "cuda":
        join_with_nccl(folder)
    model = ours_model(sizes.large)
    upstream = upstream_step(sizes.large, checkout)
    contenders = []
    for name, step in (("ours", lambda _: model.step), ("upstream", upstream)):
        for work in (sizes.large, sizes.tiny):
            run = bidirectional_step(step(work), rank, num_ranks, work)
            contenders.append(
                Contender(name, finished(run, work.place), sizes.facts(num_ranks), name == "ours")
            )
    return take_turns(contenders, repeats)


def finished(step: Callable[[], object], place: Place) -> Callable[[], object]:
    """Returns a step that ends when the device has finished it."""

    def run() -> None:
        step()
        place.finish()

    return run


def upstream_step(first: Work, checkout: Path) -> Callable[[Work], Callable[..., object]]:
    """Builds upstream's model; returns a function that gives its step for one size of messages."""
    package = load_upstream(checkout, first.place.device)
    model = build_upstream(package, first.stages(package.WeightGradStore), (1, 1))

    def step_for(work: Work) -> Callable[..., object]:
        def step(*args: object, **options: object) -> object:
            package.set_p2p_tensor_shapes([tuple(work.batch(1).shape)])
            return model.step(*args, **options)

        return step

    return step_for


def process_rows(
    place: Place, transport: str, chunks: int, stage_ms: float, repeats: int, checkout: Path
) -> tuple[list[Row], dict[str, list[Result]]]:
    """Measures ours and upstream on two processes that share the device."""
    title = f"P=2, processes, {transport}"

    def measure() -> list[Result]:
        sizes = sizes_of(place, transport, 2, chunks, stage_ms)
        with tempfile.TemporaryDirectory() as folder:
            return on_ranks(measure_process, 2, sizes, checkout, folder, repeats)

    found = attempt(measure)
    if isinstance(found, Exception):
        return [row_of(f"{title}: ours and upstream", found, lambda _: 0.0)], {}
    both = {"ours": found[:2], "upstream": found[2:]}
    rows = [row_of(f"{title}: visible share, {k}", v, visible, describe) for k, v in both.items()]
    steps = both["upstream"][0].median / both["ours"][0].median
    return [*rows, Row(f"{title}: upstream's step over ours", steps)], {title: found}


def main(
    peer_dualpipe: Annotated[Path, typer.Option(help="A checkout of deepseek-ai/DualPipe.")],
    chunks: Annotated[int, typer.Option(help="Micro-batches.")] = 20,
    stage_ms: Annotated[float, typer.Option(help="Length of each of F, I and W.")] = 2.0,
    repeats: RepeatsOption = 7,
    device: DeviceOption = "cuda",
    json: JsonOption = None,
) -> None:
    """Measure the share of a step that messages worth a quarter of a stage add to it, for both."""
    place = place_of(device)
    report = Report("overlap beside upstream", json, place.machine())
    for transport in place.transports:
        found = process_rows(place, transport, chunks, stage_ms, repeats, peer_dualpipe)
        report.add(*found)
    title = f"stages of {stage_ms:g} ms, messages worth {stage_ms / 4:g} ms, N={chunks}"
    show_rows(title, report.rows)


if __name__ == "__main__":
    typer.run(main)
