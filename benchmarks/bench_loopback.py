"""Ranks as threads over links with a latency of 3 ms: step time over simulated makespan.

The simulator knows the latency, so the rest is what the engine adds, not the link.
"""

from typing import Annotated

import typer
from common import JsonOption, RepeatsOption, Result, show, write_json
from contenders import Work, timed_ours
from thread_ranks import in_threads, seconds_of_turns


def main(
    ranks: Annotated[int, typer.Option(help="Number of ranks.")] = 8,
    chunks: Annotated[int, typer.Option(help="Micro-batches.")] = 20,
    latency_ms: Annotated[float, typer.Option(help="One-way latency of a link.")] = 3.0,
    repeats: RepeatsOption = 9,
    json: JsonOption = None,
) -> None:
    """Measure DualPipe on sleeping stages over slow links."""
    work, latency = Work(num_chunks=chunks), latency_ms / 1e3
    spans = in_threads(timed_ours, ranks, [work], repeats, link_latency=latency)
    facts = {"early": work.makespan("dualpipe", ranks, "early", latency)}
    result = Result("dualpipe_ext DualPipe", seconds_of_turns(spans, 0), facts)
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
