"""The command line's ``plan`` and ``verify``: schedules on paper, without a model or ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dualpipe_ext._build import BuildError
from dualpipe_ext._native import load_extension

if TYPE_CHECKING:
    from dualpipe_ext.schedule import Schedule, Timeline

__all__ = ["plan", "verify"]

WIDTH = 120  # of the drawing, in columns

# typer reads annotations at run time, on Python 3.10 too: hence Optional. The core is imported by a
# command alone: `build` has to work before there is one.


def plan(
    name: Annotated[str, typer.Argument(help="dualpipe, dualpipev, 1f1b, zb1p, zbv, gpipe, ...")],
    num_ranks: int,
    num_microbatches: int,
    stages_per_rank: Annotated[int, typer.Option(help="Only for interleaved_1f1b.")] = 0,
    csv: Annotated[Optional[Path], typer.Option(help="A file to write it to.")] = None,  # noqa: UP045
    forward: Annotated[float, typer.Option(help="The duration of F.")] = 1.0,
    backward_input: Annotated[float, typer.Option(help="The duration of I.")] = 1.0,
    backward_weight: Annotated[float, typer.Option(help="The duration of W.")] = 1.0,
    latency: Annotated[float, typer.Option(help="How long a message travels.")] = 0.0,
) -> None:
    """Plan a schedule and simulate it."""
    with _telling_mistakes():
        load_extension()
        from dualpipe_ext import schedule

        made = schedule.plan(name, num_ranks, num_microbatches, stages_per_rank)
        costs = schedule.CostModel(
            forward=forward,
            backward_input=backward_input,
            backward_weight=backward_weight,
            latency=latency,
        )
        typer.echo(_report(made, made.simulate(costs)))
        if csv is not None:
            made.to_csv(csv)


def verify(
    csv: Path,
    placement: Annotated[str, typer.Option(help="loop, v or bidirectional.")] = "loop",
    num_stages: Annotated[Optional[int], typer.Option(help="Of the whole model.")] = None,  # noqa: UP045
) -> None:
    """Verify a schedule in a file, and simulate it with F = I = W = 1."""
    with _telling_mistakes():
        load_extension()
        from dualpipe_ext.schedule import Schedule

        read = Schedule.from_csv(csv, placement, num_stages)  # type: ignore[arg-type]
        typer.echo(_report(read, read.simulate()))


@contextmanager
def _telling_mistakes() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, BuildError) as error:  # a ScheduleError is a ValueError
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _report(schedule: Schedule, timeline: Timeline) -> str:
    ranks = range(schedule.num_ranks)
    makespan = timeline.makespan or 1.0  # where nothing takes any time
    bubbles = [timeline.bubble(rank) / makespan for rank in ranks]
    peaks = [timeline.peak_activations(rank) for rank in ranks]
    sizes = (
        f"{schedule.num_ranks} ranks, {schedule.num_stages} stages, "
        f"{schedule.num_microbatches} micro-batches"
    )
    return "\n".join(
        [
            timeline.grid(makespan / WIDTH).rstrip(),
            "",
            f"{sizes}; valid",
            f"makespan          {timeline.makespan:g}",
            f"bubble by rank    {', '.join(f'{share:.1%}' for share in bubbles)}",
            f"live activations  {', '.join(map(str, peaks))}",
        ]
    )
