"""What every benchmark shares: ranks as processes, interleaved timing, one table, one JSON file.

Contenders take turns within each repeat, so that whatever else the machine does affects them all.
Times are those of the slowest rank, from a barrier to the end of its step.
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
        name: its name in the table.
        step: runs one step on this rank.
        facts: numbers that describe it, such as the simulated makespan of its schedule.
        is_ours: whether it runs on our engine.
        settle: waits for what a step may leave to the device; not timed.
    """

    name: str
    step: Callable[[], object]
    facts: dict[str, float] = field(default_factory=dict)
    is_ours: bool = False
    settle: Callable[[], object] = lambda: None


@dataclass
class Result:
    """The result of a contender: seconds of each timed step, and its facts."""

    name: str
    seconds: list[float]
    facts: dict[str, float]

    @property
    def median(self) -> float:
        """The median step time in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Row:
    """One line of a report: a number beside what it must reach.

    Attributes:
        name: what was measured.
        measured: the number; if it is ``None``, ``note`` says why.
        at_least: the number must be at least this.
        at_most: the number must be at most this. With neither limit, it is only reported.
        note: further remarks.
    """

    name: str
    measured: float | None
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the number is within its limits; ``None`` if there are none."""
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
    """Calls a function; returns what it raises, so that other measurements can still run."""
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
    """Returns the row of what ``attempt`` found: its number and note, or why there is none."""
    if isinstance(found, Exception):
        text = " ".join(str(found).split())[:200]
        return Row(name, None, at_least, at_most, f"{type(found).__name__}: {text}")
    return Row(name, number(found), at_least, at_most, note(found))


def take_turns(
    contenders: Sequence[Contender], repeats: int, warmup: int = 2, steps: int = 1
) -> list[Result]:
    """Times contenders in turns; every rank calls this and gets the same results.

    Args:
        contenders: what to time, in the same order on all ranks.
        repeats: the number of timed rounds.
        warmup: the number of rounds before these, which are not counted.
        steps: the number of steps per reading of the clock, for very short steps.
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
    """Sets the scheduling policy of this process's gloo threads.

    Our engine changes it for the whole process (csrc/comm/thread_policy.h); without this, peers
    that take turns with ours would profit from it.
    """
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "gloo_tcp_loop":
            os.sched_setscheduler(int(task.name), policy, os.sched_param(0))


def slowest_rank_seconds(step: Callable[[], object], steps: int) -> float:
    """Returns the seconds per step of the slowest rank; all ranks start together."""
    dist.all_reduce(torch.zeros(1))  # a barrier, which uses the CPU's backend in any group
    start = time.perf_counter()
    for _ in range(steps):
        step()
    elapsed = torch.tensor((time.perf_counter() - start) / steps, dtype=torch.float64)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return elapsed.item()


def on_ranks(function: Callable[..., T], num_ranks: int, *args: object) -> T:
    """Calls ``function(rank, num_ranks, *args)`` in a process per rank; returns rank 0's result.

    Each process has one torch thread and the default process group over gloo.
    """
    results: list[T] = run_ranks(function, num_ranks, ranks="processes", args=args, timeout=1800.0)
    return results[0]


def show(
    title: str, results: Sequence[Result], columns: dict[str, Callable[[Result], str]]
) -> None:
    """Prints a table with one row per contender and one column per entry of ``columns``."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(result.name, *(cell(result) for cell in columns.values()))
    Console(width=100).print(table)


def show_rows(title: str, rows: Sequence[Row]) -> None:
    """Prints rows, each with its limit."""
    table = Table(title=title, title_justify="left")
    for column in ("", "measured", "must reach", "note"):
        table.add_column(column)
    for row in rows:
        measured = "-" if row.measured is None else f"{row.measured:.4g}"
        table.add_row(row.name, measured, row.goal, row.note)
    Console(width=140).print(table)


@dataclass
class Report:
    """What a benchmark has found so far; written at once, as the next measurement may hang.

    Attributes:
        benchmark: its name.
        path: the file to write, if any.
        machine: facts about the device.
        rows: numbers beside what they must reach.
        cases: the results of contenders, by case.
    """

    benchmark: str
    path: Path | None
    machine: Mapping[str, str]
    rows: list[Row] = field(default_factory=list)
    cases: dict[str, Sequence[Result]] = field(default_factory=dict)

    def add(self, rows: Sequence[Row], cases: Mapping[str, Sequence[Result]] | None = None) -> None:
        """Adds what was measured last."""
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
    """Writes all measurements and facts about the machine, if a path is given.

    Args:
        path: the file to write, if any.
        benchmark: the name of the benchmark.
        cases: the results of contenders, by case.
        rows: numbers beside what they must reach.
        machine: facts about the device, in addition to those of the host.
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
