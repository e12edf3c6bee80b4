"""Milliseconds per step with stages that do nothing: what an engine costs by itself."""

from typing import Annotated

import typer
from common import (
    JsonOption,
    PeerOption,
    RepeatsOption,
    Result,
    on_ranks,
    show,
    take_turns,
    write_json,
)
from contenders import Work, sleeping_contenders
from sleeping import SleepTimes


def measure(rank: int, num_ranks: int, work: Work, repeats: int) -> list[Result]:
    """Builds and times all contenders, ten steps at a time; runs on every rank."""
    return take_turns(sleeping_contenders(rank, num_ranks, work), repeats, steps=10)


def main(
    ranks: Annotated[int, typer.Option(help="Number of ranks.")] = 2,
    chunks: Annotated[int, typer.Option(help="Micro-batches.")] = 40,
    repeats: RepeatsOption = 9,
    peer_dualpipe: PeerOption = None,
    json: JsonOption = None,
) -> None:
    """Measure engines on stages without work, messages of 4 KiB."""
    work = Work(num_chunks=chunks, times=SleepTimes(0, 0, 0), peer_dualpipe=peer_dualpipe)
    results = on_ranks(measure, ranks, work, repeats)
    ours = results[0].median
    columns = {
        "step ms": lambda result: f"{result.median * 1e3:.2f}",
        "over ours": lambda result: f"{result.median / ours:.2f}",
    }
    title = f"zero-work stages, P={ranks}, N={chunks}, 4 KiB"
    show(title, results, columns)
    write_json(json, "zero_work", {title: results})


if __name__ == "__main__":
    typer.run(main)
