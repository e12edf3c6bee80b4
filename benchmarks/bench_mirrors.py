"""What summing gradients over mirrors adds to a step: within it, after it, and not at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
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
from contenders import Work, bidirectional_step, ours_model
from peers import build_upstream, load_upstream
from places import Place, place_of
from sleeping import SleepTimes
from torch import nn

NUM_PARAMETERS = 8  # per stage


def measure(
    rank: int, num_ranks: int, work: Work, gradient_mib: float, repeats: int
) -> list[Result]:
    """Times a step without the sum, with the sum in it, and with the sum after it."""
    contenders = ours(rank, num_ranks, work, gradient_mib)
    if work.peer_dualpipe is not None:
        contenders += upstream(rank, num_ranks, work, gradient_mib, work.peer_dualpipe)
    return take_turns(contenders, repeats)


def ours(rank: int, num_ranks: int, work: Work, gradient_mib: float) -> list[Contender]:
    """Builds our three contenders, on one pipeline."""
    model = ours_model(work)
    for stage in model.module:
        give_gradients(stage, gradient_mib, work.place)
    step = bidirectional_step(model.step, rank, num_ranks, work)
    summing = bidirectional_step(partial(model.step, sync_gradients=True), rank, num_ranks, work)

    def no_sum() -> None:
        step()
        model.mark_gradients_summed()

    def summed_after() -> None:
        step()
        model.sync_gradients()

    steps = {"no sum": no_sum, "within": summing, "after": summed_after}
    return [
        Contender(f"ours, {name}", finished(run, work.place), is_ours=True)
        for name, run in steps.items()
    ]


def upstream(
    rank: int, num_ranks: int, work: Work, gradient_mib: float, checkout: Path
) -> list[Contender]:
    """Builds upstream, which leaves the sum to its user: without it, and with torch's after it."""
    package = load_upstream(checkout, work.place.device)
    stages = work.stages(package.WeightGradStore)
    model = build_upstream(package, stages, tuple(work.batch(1).shape))
    for stage in stages:
        give_gradients(stage, gradient_mib, work.place)
    step = bidirectional_step(model.step, rank, num_ranks, work)
    pairs = [dist.new_group([r, num_ranks - 1 - r]) for r in range(num_ranks // 2)]
    pair = pairs[min(rank, num_ranks - 1 - rank)]
    in_order = stages if rank < num_ranks // 2 else stages[::-1]  # the same on both ranks of a pair
    gradients = [p.grad for stage in in_order for p in stage.parameters() if p.grad is not None]

    def summed_after() -> None:
        step()
        for gradient in gradients:
            dist.all_reduce(gradient, group=pair)

    steps = {"no sum": step, "after": summed_after}
    return [Contender(f"upstream, {name}", run) for name, run in steps.items()]


def give_gradients(stage: nn.Module, mib: float, place: Place) -> None:
    """Adds parameters to a stage, with gradients of ``mib`` MiB that no action computes."""
    for i in range(NUM_PARAMETERS):
        size = int(mib * (1 << 18)) // NUM_PARAMETERS
        parameter = nn.Parameter(torch.zeros(size, device=place.device))
        parameter.grad = torch.zeros_like(parameter)
        stage.register_parameter(f"parameter{i}", parameter)


def finished(run: Callable[[], object], place: Place) -> Callable[[], object]:
    """Returns a step that ends when the device has finished it."""

    def step() -> None:
        run()
        place.finish()

    return step


def rows_of(title: str, found: list[Result] | Exception) -> list[Row]:
    """Returns what each sum adds to a step, and what share of it our sum within the step hides."""
    if isinstance(found, Exception):
        return [row_of(f"{title}: sums over mirrors", found, lambda _: 0.0)]
    steps = {result.name: 1e3 * result.median for result in found}
    rows = []
    for name, ms in steps.items():
        engine, _, kind = name.partition(", ")
        if kind != "no sum":
            added = ms - steps[f"{engine}, no sum"]
            rows.append(
                Row(
                    f"{title}: {engine}, sum {kind} the step adds, ms",
                    added,
                    note=f"{ms:.1f} ms a step",
                )
            )
    alone, within, after = (steps[f"ours, {kind}"] for kind in ("no sum", "within", "after"))
    if after <= alone:
        return [*rows, Row(f"{title}: hidden share of ours", 0.0, note="the sum is within noise")]
    return [*rows, Row(f"{title}: hidden share of ours", (after - within) / (after - alone))]


def main(
    ranks: Annotated[list[int], typer.Option(help="Numbers of ranks.")] = [4],  # noqa: B006
    chunks: Annotated[int, typer.Option(help="Micro-batches.")] = 20,
    stage_ms: Annotated[float, typer.Option(help="Length of each of F, I and W.")] = 10.0,
    gradient_mib: Annotated[float, typer.Option(help="Gradients of a stage.")] = 32.0,
    repeats: RepeatsOption = 9,
    peer_dualpipe: PeerOption = None,
    device: DeviceOption = "cuda",
    json: JsonOption = None,
) -> None:
    """Measure what the sum of gradients over mirrors adds to a step; ranks are processes."""
    place = place_of(device)
    if peer_dualpipe is not None and device != "cpu":
        raise ValueError("--peer-dualpipe is for --device cpu: ranks meet in a group of gloo here")
    report = Report("mirrors", json, place.machine())
    times = SleepTimes(*[stage_ms * 1e-3] * 3)
    for transport in place.transports:
        for num_ranks in ranks:
            work = Work(
                chunks, times=times, peer_dualpipe=peer_dualpipe, place=place, transport=transport
            )
            title = f"P={num_ranks}, {transport}"
            found = attempt(on_ranks, measure, num_ranks, work, gradient_mib, repeats)
            cases = {} if isinstance(found, Exception) else {title: found}
            report.add(rows_of(title, found), cases)
    show_rows(f"stages of {stage_ms:g} ms, {gradient_mib:g} MiB of gradients", report.rows)


if __name__ == "__main__":
    typer.run(main)
