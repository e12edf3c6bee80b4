"""Host time of the engine per action, beyond what the stages' own Python and autograd take."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from common import (
    Contender,
    DeviceOption,
    JsonOption,
    PeerOption,
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
from contenders import Work, bidirectional_step, ours_model, upstream
from peers import join_with_nccl
from places import Place, place_of
from sleeping import SleepTimes, free_loss

from dualpipe_ext import WeightGradStore

GOAL_US = 15.0


def stage_seconds(work: Work, tries: int = 50) -> float:
    """Returns the host time of a micro-batch in a stage called by hand: F, I and W, no engine."""
    stage = work.stages(WeightGradStore)[0]
    x = work.batch(1).requires_grad_()
    grad = work.batch(1)
    taken = []
    for _ in range(tries):
        x.grad = None
        start = time.perf_counter()
        y = stage(x)
        WeightGradStore.enabled = True
        y.backward(grad)
        WeightGradStore.enabled = False
        WeightGradStore.flush()
        WeightGradStore.pop()
        taken.append(time.perf_counter() - start)
        work.place.finish()
    return statistics.median(taken)


def loss_seconds(work: Work, tries: int = 50) -> float:
    """Returns the host time of the criterion and of its backward, called by hand."""
    output = work.batch(1).requires_grad_()
    taken = []
    for _ in range(tries):
        output.grad = None
        start = time.perf_counter()
        free_loss(output).backward()
        taken.append(time.perf_counter() - start)
        work.place.finish()
    return statistics.median(taken)


def host_us_an_action(
    step_s: float, num_chunks: int, num_actions: int, stage_s: float, loss_s: float
) -> float:
    """Returns what a step takes beyond its stages and criteria, in microseconds per action.

    With P = 2, each rank runs all micro-batches through a stage, and computes half of the losses.
    """
    own = num_chunks * stage_s + num_chunks / 2 * loss_s
    return (step_s - own) / num_actions * 1e6


def measure(
    rank: int, num_ranks: int, work: Work, checkout: Path | None, folder: str, repeats: int
) -> list[Result]:
    """Times the host of each engine; runs on every rank, which is a process."""
    if checkout is not None and work.place.device.type == "cuda":
        join_with_nccl(folder)
    model = ours_model(work)
    step = bidirectional_step(model.step, rank, num_ranks, work)
    facts = {"stage": stage_seconds(work), "loss": loss_seconds(work)}
    step()
    facts["actions"] = float(len(model.last_trace))
    contenders = [Contender("ours", step, facts, is_ours=True, settle=work.place.finish)]
    if checkout is not None:
        contenders.append(upstream(rank, num_ranks, work, checkout))
    return take_turns(contenders, repeats)


def own_us(results: list[Result], num_chunks: int) -> float:
    """Returns our engine's own host time, in microseconds per action."""
    ours = results[0]
    facts = ours.facts
    return host_us_an_action(
        ours.median, num_chunks, round(facts["actions"]), facts["stage"], facts["loss"]
    )


def rows_of_transport(
    place: Place, transport: str, chunks: int, repeats: int, checkout: Path | None
) -> tuple[list[Row], dict[str, list[Result]]]:
    """Measures on two processes that share the device."""
    work = Work(chunks, 4096, SleepTimes(0, 0, 0), place=place, transport=transport, light=True)

    def run() -> list[Result]:
        with tempfile.TemporaryDirectory() as folder:
            return on_ranks(measure, 2, work, checkout, folder, repeats)

    found = attempt(run)
    title = f"P=2, processes, {transport}"
    rows = [
        row_of(
            f"{title}: host us an action",
            found,
            lambda results: own_us(results, chunks),
            lambda results: (
                f"step {results[0].median * 1e3:.2f} ms, {results[0].facts['actions']:.0f} actions; "
                f"F, I and W of a stage by hand {results[0].facts['stage'] * 1e6:.0f} us"
            ),
            at_most=GOAL_US,
        )
    ]
    if isinstance(found, Exception):
        return rows, {}
    for peer in found[1:]:
        ratio = peer.median / found[0].median
        note = f"{peer.median * 1e3:.2f} ms"
        rows.append(Row(f"{title}: {peer.name}'s step over ours", ratio, note=note))
    return rows, {title: found}


def main(
    chunks: Annotated[int, typer.Option(help="Micro-batches.")] = 20,
    repeats: RepeatsOption = 15,
    peer_dualpipe: PeerOption = None,
    device: DeviceOption = "cuda",
    json: JsonOption = None,
) -> None:
    """Measure steps of stages without work: the host alone is timed, not the device behind it."""
    place = place_of(device)
    report = Report("host_time", json, place.machine())
    for transport in place.transports:
        report.add(*rows_of_transport(place, transport, chunks, repeats, peer_dualpipe))
    show_rows(f"zero-work stages, N={chunks}, 4 KiB", report.rows)


if __name__ == "__main__":
    typer.run(main)
