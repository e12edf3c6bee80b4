"""Ranks as threads over links that take 3 ms: the step over its simulated makespan.

The simulator knows the latency, so what is left is what the engine adds, not what the link does.
"""

import threading
import time
from typing import Annotated

import typer
from common import JsonOption, RepeatsOption, Result, show, write_json
from contenders import Work, bidirectional_step
from sleeping import SleepStage

from dualpipe_ext import DualPipe, WeightGradStore
from dualpipe_ext.schedule import CostModel, plan
from dualpipe_ext.testing import run_ranks


def timed_steps(
    rank: int, num_ranks: int, work: Work, repeats: int, start_line: threading.Barrier
) -> list[tuple[float, float]]:
    """Run steps on one rank; return when each began and ended, in seconds of one clock."""
    model = DualPipe([SleepStage(work.times, WeightGradStore) for _ in range(2)])
    step = bidirectional_step(model.step, rank, num_ranks, work)
    step()
    spans = []
    for _ in range(repeats):
        start_line.wait()
        begin = time.perf_counter()
        step()
        spans.append((begin, time.perf_counter()))
    return spans


def makespan(work: Work, num_ranks: int, latency: float) -> float:
    """Return the simulated seconds of a step over links of that latency."""
    cost = CostModel(
        forward=work.times.forward,
        backward_input=work.times.backward_input,
        backward_weight=work.times.backward_weight,
        latency=latency,
    )
    planned = plan("dualpipe", num_ranks=num_ranks, num_microbatches=work.num_chunks)
    return planned.simulate(cost, sends="early").makespan


def main(
    ranks: Annotated[int, typer.Option(help="Number of ranks.")] = 8,
    chunks: Annotated[int, typer.Option(help="Micro-batches.")] = 20,
    latency_ms: Annotated[float, typer.Option(help="One-way latency of a link.")] = 3.0,
    repeats: RepeatsOption = 9,
    json: JsonOption = None,
) -> None:
    """Measure DualPipe on sleeping stages over slow links."""
    work, latency = Work(num_chunks=chunks), latency_ms / 1e3
    spans = run_ranks(
        timed_steps,
        ranks,
        ranks="threads",
        args=(work, repeats, threading.Barrier(ranks)),
        link_latency=latency,
    )
    steps = [
        max(end for _, end in step) - min(begin for begin, _ in step)
        for step in zip(*spans, strict=True)
    ]
    facts = {"early": makespan(work, ranks, latency)}
    result = Result("dualpipe_ext DualPipe", steps, facts)
    columns = {
        "step ms": lambda result: f"{result.median * 1e3:.1f}",
        "simulated ms": lambda result: f"{result.facts['early'] * 1e3:.1f}",
        "over simulated": lambda result: f"{result.median / result.facts['early']:.3f}",
    }
    title = f"threads, P={ranks}, N={chunks}, links of {latency_ms:g} ms"
    show(title, [result], columns)
    write_json(json, "loopback", {title: [result]})


if __name__ == "__main__":
    typer.run(main)
