"""Writes the trace of a step to a file to look at: what was measured above what was planned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dualpipe_ext.schedule import Timeline
from dualpipe_ext.stats import TraceEvent

__all__ = ["write_trace"]

_MICROSECONDS = 1e6
Event = dict[str, Any]  # of the Trace Event Format, which Perfetto and chrome://tracing read


def write_trace(path: Path, measured: Sequence[Sequence[TraceEvent]], planned: Timeline) -> None:
    """Writes JSON with two groups, each with one thread per rank.

    Args:
        path: the file to write.
        measured: the trace of each rank, by rank.
        planned: the plan of the same step; it is scaled to the length of the measured one.
    """
    end = max((event.end for trace in measured for event in trace), default=0.0)
    events = [*_named(0, "measured", len(measured)), *_named(1, "planned", len(measured))]
    for rank, trace in enumerate(measured):
        for event in trace:
            computes = event.start + event.wait
            events += [
                _slice(0, rank, "wait", event.start, computes),
                _slice(0, rank, event.action, computes, event.end),
            ]
        scale = end / planned.makespan
        for span in planned.spans(rank):
            events.append(_slice(1, rank, span.action, span.start * scale, span.end * scale))
    found = [event for event in events if event.get("dur", 1.0) > 0.0]
    path.write_text(json.dumps({"traceEvents": found, "displayTimeUnit": "ms"}))


def _named(group: int, name: str, num_ranks: int) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": group, "args": {"name": name}}
    for rank in range(num_ranks):
        place = {"pid": group, "tid": rank}
        yield {"ph": "M", "name": "thread_name", **place, "args": {"name": f"rank {rank}"}}


def _slice(group: int, rank: int, name: str, start: float, end: float) -> Event:
    start, end = start * _MICROSECONDS, end * _MICROSECONDS
    return {"ph": "X", "name": name, "pid": group, "tid": rank, "ts": start, "dur": end - start}
