"""Where the time of a pipeline's steps goes: the engine's measurements, summed over steps."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dualpipe_ext.schedule import parse_action
from dualpipe_ext.stats import StepStatistics, TraceEvent

__all__ = [
    "Profiler",
    "disable_profiling",
    "enable_profiling",
    "get_profiler",
    "is_profiling",
    "record_step",
]

_KEPT_STEPS = 1000


@dataclass
class _Time:
    """Computations of one kind: ``F``, ``I``, ``W``, ``B``, or an overlapped pair of two."""

    count: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0

    def add(self, event: TraceEvent) -> None:
        self.count += 1
        self.seconds += event.end - event.start - event.wait
        self.waiting_seconds += event.wait


@dataclass
class _Steps:
    """The training steps or the inference steps of one rank."""

    count: int = 0
    total_seconds: float = 0.0
    busy_seconds: float = 0.0
    last_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_STEPS))
    last: StepStatistics | None = None
    actions: dict[str, _Time] = field(default_factory=dict)

    def add(self, step: StepStatistics, trace: Sequence[TraceEvent]) -> None:
        self.count += 1
        self.total_seconds += step.step_seconds
        self.busy_seconds += step.busy_seconds
        self.last_seconds.append(step.step_seconds)
        self.last = step
        for event in trace:
            kind = "&".join(part.op for part in parse_action(event.action))
            self.actions.setdefault(kind, _Time()).add(event)

    def summary(self) -> dict[str, Any]:
        assert self.last is not None
        waiting = sum(time.waiting_seconds for time in self.actions.values())
        return {
            "clock": self.last.clock,
            "steps": self.count,
            "mean_step_seconds": self.total_seconds / self.count,
            "mean_computing_seconds": self.busy_seconds / self.count,
            "mean_waiting_seconds": waiting / self.count,
            "measured_bubble": 1.0 - self.busy_seconds / max(self.total_seconds, 1e-9),
            "planned_bubble": self.last.planned_bubble,
            "peak_live_activations": self.last.peak_live_activations,
            "planned_peak_activations": self.last.planned_peak_activations,
            "actions": {kind: vars(time) for kind, time in sorted(self.actions.items())},
            "last_step_seconds": list(self.last_seconds),
        }


class Profiler:
    """The times of all steps of this process's pipelines since :func:`enable_profiling`.

    Stages on a GPU are timed by the GPU's clock, and each step waits for the GPU at its end: while
    profiling is enabled, the host does not run ahead into the next step.

    Args:
        log_dir: the folder that relative file paths refer to.
    """

    def __init__(self, log_dir: str | os.PathLike[str] = ".") -> None:
        self.log_dir = Path(log_dir)
        self._lock = threading.Lock()  # ranks may be threads
        self._steps: dict[tuple[int, bool], _Steps] = {}

    def record(
        self, rank: int, training: bool, step: StepStatistics, trace: Sequence[TraceEvent]
    ) -> None:
        """Records one step of a rank."""
        with self._lock:
            self._steps.setdefault((rank, training), _Steps()).add(step, trace)

    def summary(self) -> list[dict[str, Any]]:
        """Returns means over steps, one dictionary for each rank of this process and kind of step.

        ``actions`` holds, for each kind of computation over all steps, the count, the seconds spent
        computing and the seconds blocked on messages. ``last_step_seconds`` covers at most the last
        1000 steps.

        Raises:
            ValueError: no step was recorded.
        """
        with self._lock:
            found = [
                {"rank": rank, "kind": "training" if training else "inference", **steps.summary()}
                for (rank, training), steps in sorted(self._steps.items())
            ]
        if not found:
            raise ValueError(
                "the profiler has seen no step: call enable_profiling() before the training loop, "
                "in the process that runs it"
            )
        return found

    def print_summary(self) -> None:
        """Prints means over steps, one line for each rank of this process and kind of step."""
        from rich.console import Console  # here, as it takes a tenth of this package's import time
        from rich.table import Table

        table = Table(title="a step's time")
        for column in (
            "rank",
            "kind",
            "clock",
            "steps",
            "ms",
            "computing",
            "waiting",
            "bubble",
            "planned",
        ):
            table.add_column(column, justify="left" if column in ("kind", "clock") else "right")
        table.add_column("ms of each computation")
        for found in self.summary():
            mean = found["mean_step_seconds"]
            table.add_row(
                str(found["rank"]),
                found["kind"],
                found["clock"],
                str(found["steps"]),
                f"{1e3 * mean:.2f}",
                f"{found['mean_computing_seconds'] / mean:.0%}",
                f"{found['mean_waiting_seconds'] / mean:.0%}",
                f"{found['measured_bubble']:.0%}",
                f"{found['planned_bubble']:.0%}",
                ", ".join(
                    f"{kind} {1e3 * time['seconds'] / time['count']:.2f}"
                    for kind, time in found["actions"].items()
                ),
            )
        Console(width=120).print(table)

    def save_to_file(self, path: str | os.PathLike[str]) -> Path:
        """Writes :meth:`summary` as JSON, one file per process.

        Args:
            path: the file of the first process; others insert ``.rank1`` and so on before its
                suffix.

        Returns:
            The path of the file that was written.
        """
        found = self.summary()
        target = self.log_dir / path
        process = dist.get_rank() if dist.is_initialized() else 0
        if process:
            target = target.with_name(f"{target.stem}.rank{process}{target.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"ranks": found}, indent=1) + "\n")
        return target


_profiler: Profiler | None = None


def enable_profiling(log_dir: str | os.PathLike[str] = ".") -> Profiler:
    """Starts recording the times of all steps in this process; discards earlier ones.

    Args:
        log_dir: the folder that :meth:`Profiler.save_to_file` writes to; created if needed.
    """
    global _profiler
    _profiler = Profiler(log_dir)
    return _profiler


def disable_profiling() -> None:
    """Stops recording steps; :func:`get_profiler` raises from then on."""
    global _profiler
    _profiler = None


def get_profiler() -> Profiler:
    """Returns the profiler of this process.

    Raises:
        ValueError: profiling is not enabled.
    """
    if _profiler is None:
        raise ValueError("there is no profiler: call enable_profiling() before the training loop")
    return _profiler


def is_profiling() -> bool:
    """Whether steps are being recorded."""
    return _profiler is not None


def record_step(pipeline: Any, training: bool) -> None:
    """Records the last step of a pipeline, if profiling is enabled."""
    profiler = _profiler
    if profiler is not None:
        profiler.record(pipeline.rank, training, pipeline.stats(), pipeline.last_trace)
