"""What a step did, as measured by the engine, beside what the schedule plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["StepStatistics", "TraceEvent"]


class TraceEvent(NamedTuple):
    """One computation of a step, with times in seconds since the step began.

    ``wait`` is the part of it that was spent blocked on messages.
    :attr:`StepStatistics.clock` says by which clock the times were taken.
    """

    action: str
    start: float
    end: float
    wait: float


@dataclass(frozen=True)
class StepStatistics:
    """The last step on this rank.

    Attributes:
        clock: ``"host"``; or ``"device"`` for stages on a GPU, if :attr:`~dualpipe_ext.Pipeline.
            times_device` asked for it. A host that runs ahead of its GPU knows when work was
            issued, but not how long it took.
        step_seconds: from the call to the commit on all ranks. By the device's clock: from when
            this rank's stream reaches the step until it has passed its last computation, so that
            idle time after that is in none of these numbers.
        busy_seconds: the part of ``step_seconds`` spent computing.
        measured_bubble: the share of the step in which this rank did not compute.
        planned_bubble: the same in the schedule, with F = I = W and messages that take no time.
        peak_live_activations: the most micro-batches (counted once for each stage) of which the
            engine kept something at once, for a backward or for deferred weight gradients; 0 in
            inference.
        planned_peak_activations: the same in the schedule, where each is kept until its B or W.
    """

    clock: Literal["host", "device"]
    step_seconds: float
    busy_seconds: float
    measured_bubble: float
    planned_bubble: float
    peak_live_activations: int
    planned_peak_activations: int
