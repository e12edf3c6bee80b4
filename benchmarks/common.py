"""What every benchmark shares: ranks as processes, interleaved timing, one table, one JSON file.

Contenders take turns within each repeat, so that whatever else the machine does meets them all.
A time is that of the slowest rank, from a barrier to the end of its step.
"""

import json
import os
import platform
import shlex
import statistics
import sys
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
DeviceOption = Annotated[
    str, typer.Option(help="cuda; or cpu, to try the benchmark out: its numbers mean nothing.")
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
        settle: Waits for what a step may leave to the device; not timed.
    """

    name: str
    step: Callable[[], object]
    facts: dict[str, float] = field(default_factory=dict)
    is_ours: bool = False
    settle: Callable[[], object] = lambda: None


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


@dataclass(frozen=True)
class Row:
    """One line of a report: a number beside what it must reach.

    Attributes:
        name: What was measured.
        measured: The number; ``None`` where there is none, and ``note`` says why.
        at_least: The number must be at least this.
        at_most: The number must be at most this. With neither limit it is reported alone.
        note: What else there is to know.
    """

    name: str
    measured: float | None
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether it reaches what it must; ``None`` where it must reach nothing."""
        if self.at_least is None and self.at_most is None:
            return None
        if self.measured is None:
            return False
        if self.at_least is not None and self.measured < self.at_least:
            return False
        return self.at_most is None or self.measured <= self.at_most

    @property
    def goal(self) -> str:
        """The limit as text."""
        if self.at_least is not None and self.at_least == self.at_most:
            return f"{self.at_least:g}"
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "-" if self.at_most is None else f"<= {self.at_most:g}"


def attempt(function: Callable[..., T], *args: object) -> T | Exception:
    """Call, or return what it raised: one measurement that fails does not take the others along."""
    try:
        return function(*args)
    except Exception as error:  # noqa: BLE001 - reported by row_of
        return error


def row_of(
    name: str,
    found: T | Exception,
    number: Callable[[T], float],
    note: Callable[[T], str] = lambda _: "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Return the row of what ``attempt`` found: its number and note, or why there is none."""
    if isinstance(found, Exception):
        text = " ".join(str(found).split())[:200]
        return Row(name, None, at_least, at_most, f"{type(found).__name__}: {text}")
    return Row(name, number(found), at_least, at_most, note(found))


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
            contender.settle()
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
    dist.all_reduce(torch.zeros(1))  # a barrier, of the CPU's backend in any group
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


def show_rows(title: str, rows: Sequence[Row]) -> None:
    """Print rows, each with its limit."""
    table = Table(title=title, title_justify="left")
    for column in ("", "measured", "must reach", "note"):
        table.add_column(column)
    for row in rows:
        measured = "-" if row.measured is None else f"{row.measured:.4g}"
        table.add_row(row.name, measured, row.goal, row.note)
    Console(width=140).print(table)


@dataclass
class Report:
    """What a benchmark has found so far; in its file at once, for the next measurement may hang.

    Attributes:
        benchmark: Its name.
        path: Where to write, if anywhere.
        machine: What is known of the device.
        rows: Numbers beside what they must reach.
        cases: What each contender took, by case.
    """

    benchmark: str
    path: Path | None
    machine: Mapping[str, str]
    rows: list[Row] = field(default_factory=list)
    cases: dict[str, Sequence[Result]] = field(default_factory=dict)

    def add(self, rows: Sequence[Row], cases: Mapping[str, Sequence[Result]] | None = None) -> None:
        """Add what was measured last."""
        self.rows += rows
        self.cases |= cases or {}
        write_json(self.path, self.benchmark, self.cases, self.rows, self.machine)


def write_json(
    path: Path | None,
    benchmark: str,
    cases: Mapping[str, Sequence[Result]],
    rows: Sequence[Row] = (),
    machine: Mapping[str, str] | None = None,
) -> None:
    """Write all measurements, with the machine they were taken on, if a path was given.

    Args:
        path: Where to.
        benchmark: Its name.
        cases: What each contender took, by case.
        rows: Numbers beside what they must reach.
        machine: What is known of a device besides.
    """
    if path is None:
        return
    measured = {
        case: [asdict(result) | {"median": result.median} for result in results]
        for case, results in cases.items()
    }
    host: dict[str, object] = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    report = {
        "benchmark": benchmark,
        "command": shlex.join(["python", *sys.argv]),
        "machine": host | dict(machine or {}),
        "rows": [asdict(row) | {"goal": row.goal, "passed": row.passed} for row in rows],
        "cases": measured,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
