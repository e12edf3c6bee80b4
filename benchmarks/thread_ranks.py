"""Times steps from a common start, on ranks that are threads of one process and share a device."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from places import Place

from dualpipe_ext.testing import run_ranks

Span = tuple[float, float]  # seconds of one clock
MOST_OVER_NCCL = 2  # more were seen to wait for each other in shared hardware queues


def why_not_in_threads(transport: str, num_ranks: int) -> str | None:
    """Returns why ``num_ranks`` ranks are not measured as threads, or ``None``."""
    if transport != "nccl" or num_ranks <= MOST_OVER_NCCL:
        return None
    return (
        f"not measured: over NCCL more than {MOST_OVER_NCCL} ranks in one process have more streams "
        f"than there are hardware queues, and may wait for each other for ever"
    )


class StartLine:
    """Where the threads of a benchmark wait for one another; one that fails releases the others."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks)

    def wait(self) -> None:
        """Waits for all threads.

        Raises:
            TimeoutError: one of them failed, or takes too long.
        """
        try:
            self._barrier.wait(60.0)
        except threading.BrokenBarrierError:
            raise TimeoutError("another rank of the benchmark failed") from None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Releases the others if the block fails."""
        try:
            yield
        except BaseException:
            self._barrier.abort()
            raise


def in_threads(
    function: Callable[..., Any], num_ranks: int, *args: object, **options: Any
) -> list[Any]:
    """Calls ``function(rank, num_ranks, start_line, *args)`` in a thread per rank.

    Returns the results, by rank.

    Args:
        function: what each rank runs.
        num_ranks: the number of ranks.
        args: further arguments of the function.
        options: options of ``run_ranks``.
    """
    start_line = StartLine(num_ranks)

    def run(rank: int, size: int) -> Any:
        with start_line.kept():
            return function(rank, size, start_line, *args)

    return run_ranks(run, num_ranks, "threads", **options)


def timed_turns(
    steps: Sequence[Callable[[], object]],
    repeats: int,
    start_line: StartLine,
    place: Place,
    warmup: int = 2,
) -> list[list[Span]]:
    """Runs the steps in turns; returns when this rank began and ended each run, by step.

    The device is idle when a step begins, and a step ends when its work on the device does.
    """
    spans: list[list[Span]] = [[] for _ in steps]
    for turn in range(warmup + repeats):
        for step, taken in zip(steps, spans, strict=True):
            place.finish()
            start_line.wait()
            begin = time.perf_counter()
            step()
            place.finish()
            if turn >= warmup:
                taken.append((begin, time.perf_counter()))
    return spans


def step_seconds(spans_of_ranks: Sequence[Sequence[Span]]) -> list[float]:
    """Returns the length of each step, from the first rank's beginning to the last rank's end."""
    return [
        max(end for _, end in step) - min(begin for begin, _ in step)
        for step in zip(*spans_of_ranks, strict=True)
    ]


def seconds_of_turns(spans: Sequence[Sequence[Sequence[Span]]], which: int) -> list[float]:
    """Returns the lengths of one of the steps of ``timed_turns``, given the spans of all ranks."""
    return step_seconds([of_rank[which] for of_rank in spans])


def median_of_turns(spans: Sequence[Sequence[Sequence[Span]]], which: int) -> float:
    """Returns the median length of that step."""
    return statistics.median(seconds_of_turns(spans, which))
