"""Step time over simulated makespan, with stages that sleep 10 ms for each of F, I and W."""

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

COLUMNS = {
    "step ms": lambda result: f"{result.median * 1e3:.1f}",
    "paper, early ms": lambda result: f"{result.facts['early'] * 1e3:.0f}",
    "over early": lambda result: f"{result.median / result.facts['early']:.3f}",
    "over late": lambda result: f"{result.median / result.facts['late']:.3f}",
    "busy": lambda result: f"{result.facts['busy'] / result.median:.1%}",
}


def measure(rank: int, num_ranks: int, work: Work, repeats: int) -> list[Result]:
    """Builds and times all contenders; runs on every rank."""
    return take_turns(sleeping_contenders(rank, num_ranks, work), repeats)


def main(
    ranks: Annotated[list[int], typer.Option(help="Numbers of ranks.")] = [4, 8],  # noqa: B006
    message_bytes: Annotated[
        list[int], typer.Option(help="Message sizes; the large only at P=4.")
    ] = [4096, 1 << 20],  # noqa: B006
    chunks: Annotated[int, typer.Option(help="Micro-batches.")] = 20,
    repeats: RepeatsOption = 9,
    peer_dualpipe: PeerOption = None,
    json: JsonOption = None,
) -> None:
    """Measure DualPipe, its upstream and torch's schedules on sleeping stages."""
    cases: dict[str, list[Result]] = {}
    for num_ranks in ranks:
        for size in message_bytes:
            work = Work(num_chunks=chunks, message_bytes=size, peer_dualpipe=peer_dualpipe)
            title = f"P={num_ranks}, N={chunks}, messages of {size // 1024} KiB"
            cases[title] = on_ranks(measure, num_ranks, work, repeats)
            show(title, cases[title], COLUMNS)
    write_json(json, "sleep", cases)


if __name__ == "__main__":
    typer.run(main)
