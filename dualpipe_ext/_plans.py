"""Schedules resolved for one rank: made once for each kind of step, then reused."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from dualpipe_ext import _C
from dualpipe_ext._batch import RankBatch
from dualpipe_ext._source import ScheduleSource
from dualpipe_ext.schedule import CostModel, Schedule, Timeline

__all__ = ["PlannedStep", "StepPlanner"]


@dataclass(frozen=True)
class PlannedStep:
    """A schedule, resolved for one rank and one way of running it."""

    schedule: Schedule  # compute actions
    lowered: Schedule
    program: _C.Program
    batch: RankBatch
    trains: bool

    @cached_property
    def planned_bubble(self) -> float:
        """The share of the step in which this rank idles, with F = I = W and instant messages."""
        return self.timeline.bubble(self.batch.rank) / self.timeline.makespan

    @cached_property
    def timeline(self) -> Timeline:
        """A training step with F = I = W and instant messages."""
        return self.schedule.simulate(CostModel(), sends="early")


@dataclass
class StepPlanner:
    """Plans, lowers, verifies and resolves. ``keep_overlap``: pairs stay one action in training."""

    source: ScheduleSource
    rank: int
    lookahead: int
    keep_overlap: bool
    _known: dict[tuple[int, bool, bool], PlannedStep] = field(default_factory=dict)

    def plan(self, num_chunks: int, training: bool, sum_gradients: bool) -> PlannedStep:
        """Returns the step for these arguments; ``sum_gradients`` is ignored without training.

        Raises:
            ScheduleError: the planner does not support ``num_chunks``.
            ValueError: a fixed schedule has another number of micro-batches.
        """
        key = (num_chunks, training, sum_gradients and training)
        if key not in self._known:
            self._known[key] = self._make(*key)
        return self._known[key]

    def _make(self, num_chunks: int, training: bool, sum_gradients: bool) -> PlannedStep:
        schedule = self.source.plan(num_chunks)
        if training and not _has_backwards(schedule):
            raise ValueError(
                f"schedule {schedule.name!r} has no backwards (B, or I and W): it can run under "
                f"torch.no_grad(), but it cannot train"
            )
        lowered = schedule.lower(
            lookahead=self.lookahead,
            keep_overlap=self.keep_overlap and training,
            with_backward=training,
            reduce_gradients=sum_gradients,
        )
        lowered.verify()
        description = (
            f"{self.source.name}, {self.source.num_ranks} ranks, {num_chunks} micro-batches, "
            f"{'training' if training else 'inference'}"
            f"{', summing gradients' if sum_gradients else ''}"
        )
        program = _C.Program(lowered.native, self.rank, description)
        return PlannedStep(schedule, lowered, program, RankBatch(schedule, self.rank), training)


def _has_backwards(schedule: Schedule) -> bool:
    actions = (action for rank in range(schedule.num_ranks) for action in schedule.actions(rank))
    return any("B" in action or "I" in action for action in actions)
