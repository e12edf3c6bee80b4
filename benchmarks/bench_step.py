"""Ranks as threads that share one device, stages of 2 ms: step time over simulated makespan."""

from __future__ import annotations

from typing import Annotated

import typer
from common import (
    DeviceOption,
    JsonOption,
    RepeatsOption,
    Report,
    Result,
    Row,
    attempt,
    row_of,
    show_rows,
)
from contenders import Work, timed_ours
from places import Place, place_of
from sleeping import SleepTimes
from thread_ranks import in_threads, seconds_of_turns, why_not_in_threads

GOAL = 1.04


def work_of(place: Place, transport: str, chunks: int, stage_ms: float) -> Work:
    """Returns steps of stages that take ``stage_ms`` for each of F, I and W."""
    times = SleepTimes(*[stage_ms * 1e-3] * 3)
    return Work(chunks, 4096, times, place=place, transport=transport, light=True)


def step_result(work: Work, num_ranks: int, repeats: int) -> Result:
    """Times steps on ranks that are threads."""
    spans = in_threads(timed_ours, num_ranks, [work], repeats)
    facts = work.paper("dualpipe", num_ranks)
    return Result(work.transport, seconds_of_turns(spans, 0), facts)


def title(num_ranks: int, transport: str) -> str:
    """Returns the name of a measurement."""
    return f"P={num_ranks}, {transport}: step over simulated makespan"


def row(num_ranks: int, transport: str, found: Result | Exception) -> Row:
    """Returns the row of one measurement."""
    return row_of(
        title(num_ranks, transport),
        found,
        lambda result: result.median / result.facts["early"],
        lambda result: (
            f"{result.median * 1e3:.2f} ms, simulated {result.facts['early'] * 1e3:.2f} ms"
        ),
        at_most=GOAL,
    )


def main(
    ranks: Annotated[list[int], typer.Option(help="Numbers of ranks.")] = [4, 8],  # noqa: B006
    chunks: Annotated[int, typer.Option(help="Micro-batches.")] = 20,
    stage_ms: Annotated[float, typer.Option(help="Length of each of F, I and W.")] = 2.0,
    repeats: RepeatsOption = 9,
    device: DeviceOption = "cuda",
    json: JsonOption = None,
) -> None:
    """Measure DualPipe on stages of known length, messages of 4 KiB."""
    place = place_of(device)
    report = Report("step", json, place.machine())
    for transport in place.transports:
        for num_ranks in ranks:
            if problem := why_not_in_threads(transport, num_ranks):
                report.add([Row(title(num_ranks, transport), None, note=problem)])
                continue
            work = work_of(place, transport, chunks, stage_ms)
            found = attempt(step_result, work, num_ranks, repeats)
            cases = {f"P={num_ranks}, {transport}": [found]} if isinstance(found, Result) else {}
            report.add([row(num_ranks, transport, found)], cases)
    show_rows(f"stages of {stage_ms:g} ms, N={chunks}", report.rows)


if __name__ == "__main__":
    typer.run(main)
