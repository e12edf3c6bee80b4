"""What every benchmark shares: ranks as processes, interleaved timing, one table, one JSON file.

Contenders take turns within each repeat, so that whatever else the machine does meets them all.
A time is that of the slowest rank, from a barrier to the end of its step.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from dualpipe_ext.testing import run_ranks

T = TypeVar("T")

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write every measurement here.")]
PeerOption = Annotated[
    Path | None, typer.Option("--peer-dualpipe", help="A checkout of deepseek-ai/DualPipe.")
]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Timed steps of each contender.")]


@dataclass
class Contender:
    """One way to run the same work, built on every rank.

    Attributes:
        name: What the table calls it.
        step: Runs one step on this rank.
        facts: Numbers that describe it, such as the makespan that its schedule has on paper.
        is_ours: It runs on our engine.
    """

    name: str
    step: Callable[[], object]
    facts: dict[str, float] = field(default_factory=dict)
    is_ours: bool = False


@dataclass
class Result:
    """What a contender took: seconds of each timed step, and its facts."""

    name: str
    seconds: list[float]
    facts: dict[str, float]

    @property
    def median(self) -> float:
        """Median step time in seconds."""
        return statistics.median(self.seconds)


def take_turns(
    contenders: Sequence[Contender], repeats: int, warmup: int = 2, steps: int = 1
) -> list[Result]:
    """Time contenders in turns; every rank calls this and gets the same results.

    Args:
        contenders: Built in the same order on all ranks.
        repeats: Timed rounds.
        warmup: Rounds before, not counted.
        steps: Steps between two looks at the clock, for steps that are very short.
    """
    results = [Result(each.name, [], each.facts) for each in contenders]
    for turn in range(warmup + repeats):
        for contender, result in zip(contenders, results, strict=True):
            schedule_gloo(os.SCHED_BATCH if contender.is_ours else os.SCHED_OTHER)
            elapsed = slowest_rank_seconds(contender.step, steps)
            if turn >= warmup:
                result.seconds.append(elapsed)
    return results


def schedule_gloo(policy: int) -> None:
    """Set the policy of this process's gloo threads.

    Our engine changes it for the whole process (csrc/comm/thread_policy.h); without this, peers
    that take turns with ours would profit.
    """
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "gloo_tcp_loop":
            os.sched_setscheduler(int(task.name), policy, os.sched_param(0))


def slowest_rank_seconds(step: Callable[[], object], steps: int) -> float:
    """Return seconds a step on the slowest rank, started together."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    elapsed = torch.tensor((time.perf_counter() - start) / steps, dtype=torch.float64)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return elapsed.item()


def on_ranks(function: Callable[..., T], num_ranks: int, *args: object) -> T:
    """Call ``function(rank, num_ranks, *args)`` in one process a rank; return what rank 0 returns.

    Each process has one torch thread and the default process group over gloo.
    """
    results: list[T] = run_ranks(function, num_ranks, ranks="processes", args=args, timeout=1800.0)
    return results[0]


def show(
    title: str, results: Sequence[Result], columns: dict[str, Callable[[Result], str]]
) -> None:
    """Print a table: one row a contender, a column for each entry of ``columns``."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(result.name, *(cell(result) for cell in columns.values()))
    Console(width=100).print(table)


def write_json(path: Path | None, benchmark: str, cases: Mapping[str, Sequence[Result]]) -> None:
    """Write all measurements, with the machine they were taken on, if a path was given."""
    if path is None:
        return
    measured = {
        case: [asdict(result) | {"median": result.median} for result in results]
        for case, results in cases.items()
    }
    machine = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    report = {"benchmark": benchmark, "machine": machine, "cases": measured}
    path.write_text(json.dumps(report, indent=2) + "\n")
