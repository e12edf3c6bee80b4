"""Schedules as data: plan them, prove them, lower them to messages, simulate them.

>>> from dualpipe_ext.schedule import CostModel, plan
>>> schedule = plan("dualpipe", num_ranks=4, num_microbatches=8)
>>> schedule.actions(0)[:4]
['0F0', '0F1', '0F2', '3F4']
>>> schedule.simulate(CostModel(), sends="early").bubble(0)
1.0

An action's text is that of ``torch.distributed.pipelining``: stage, operation, micro-batch.
Operations are ``F`` (forward), ``I`` (backward for inputs), ``W`` (backward for weights), ``B``
(both), ``(0F7;7B13)OVERLAP_F_B`` (a forward and a backward of different micro-batches as one),
``SEND_F``, ``RECV_F``, ``SEND_B``, ``RECV_B`` and ``REDUCE_GRAD``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, cast

from dualpipe_ext import _C

__all__ = [
    "Action",
    "CostModel",
    "Diagnostic",
    "PlannerInfo",
    "Schedule",
    "ScheduleError",
    "Span",
    "Timeline",
    "parse_action",
    "plan",
    "schedules",
]

ScheduleError = _C.ScheduleError

Placement = Literal["loop", "v", "bidirectional"]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class PlannerInfo:
    """A built-in schedule."""

    name: str
    placement: str
    """Where stages live: ``loop`` (stage s on rank s mod P), ``v`` or ``bidirectional``."""
    stages_per_rank: int
    """How many stages a rank runs; 0: any number."""
    summary: str
    """One line, with the source."""


@dataclass(frozen=True)
class Diagnostic:
    """One mistake in a schedule."""

    rank: int
    step: int
    """Index into the rank's actions; -1: the whole row."""
    text: str


class Action(NamedTuple):
    """A computation, a message or a reduction of one stage."""

    op: str
    """The letters of the text: ``F``, ``SEND_F``, ..."""
    stage: int
    microbatch: int | None
    """``None`` for ``REDUCE_GRAD``."""


@dataclass(frozen=True)
class Span:
    """One action and when it ran, in the timeline's unit of time."""

    action: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """How long things take, all in one unit of time of your choice.

    A duration of F, I or W is one number for all stages, or a sequence with one for each stage.

    Raises:
        ScheduleError: (in ``simulate``) a duration is negative or not finite, or there are not as
            many as stages.
    """

    forward: float | Sequence[float] = 1.0
    backward_input: float | Sequence[float] = 1.0
    backward_weight: float | Sequence[float] = 1.0
    overlapped: float | None = None
    """A forward and a backward as one overlapped piece; ``None``: their parts, one by one."""
    latency: float = 0.0
    """From a message's end at the sender to its arrival."""
    message_time: float = 0.0
    """Bytes over bandwidth: how long a message occupies its channel."""


class Timeline:
    """What every rank ran, and when."""

    def __init__(self, native: _C.Timeline) -> None:
        self._native = native

    @property
    def makespan(self) -> float:
        """From the start of the step to the end of the last action."""
        return self._native.makespan

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return self._native.num_ranks

    def spans(self, rank: int) -> list[Span]:
        """A rank's compute actions in order, with their times."""
        return [Span(*span) for span in self._native.spans(rank)]

    def busy(self, rank: int) -> float:
        """The time that a rank computes."""
        return self._native.busy(rank)

    def bubble(self, rank: int) -> float:
        """The makespan minus the time that a rank computes."""
        return self._native.bubble(rank)

    def peak_activations(self, rank: int) -> int:
        """The most micro-batches whose activations a rank holds at once, from F to B or W."""
        return self._native.peak_activations(rank)

    def grid(self, unit: float = 0.25) -> str:
        """A line for each rank and a character for each ``unit`` of time; bubbles are dots."""
        return self._native.grid(unit)

    def to_chrome_trace(self, path: PathLike, microseconds_per_unit: float = 1000.0) -> None:
        """Writes JSON for ``chrome://tracing`` or Perfetto, a thread for each rank."""
        Path(path).write_text(self._native.to_chrome_trace(microseconds_per_unit))


class Schedule:
    """What every rank does, in order. Immutable; equal to another that does the same, whatever its name."""

    def __init__(self, native: _C.Schedule) -> None:
        self._native = native

    @classmethod
    def from_csv(
        cls, path: PathLike, placement: Placement = "loop", num_stages: int | None = None
    ) -> Schedule:
        """Reads a schedule: a line for each rank, actions separated by commas, empty cells allowed.

        Args:
            path: the file; ``torch.distributed.pipelining`` writes and reads the same format.
            placement: where stages live: ``loop``, ``v`` or ``bidirectional``.
            num_stages: of the whole model. Left out: one a rank (``loop`` and ``bidirectional``)
                or two a rank (``v``).

        Raises:
            ScheduleError: a malformed cell (with line and column), sizes that the placement cannot
                serve, or a schedule that does not hold (see :meth:`verify`).
        """
        text = Path(path).read_text()
        if num_stages is None:
            num_stages = len(text.rstrip().splitlines()) * (2 if placement == "v" else 1)
        schedule = cls(_C.schedule_from_csv(text, placement, num_stages))
        schedule._native.name = Path(path).stem
        schedule.verify()
        return schedule

    @property
    def native(self) -> _C.Schedule:
        """The schedule as the engine takes it."""
        return self._native

    @property
    def name(self) -> str:
        """The planner's name, or that of the file."""
        return self._native.name

    @property
    def placement(self) -> Placement:
        """Where stages live: ``loop``, ``v`` or ``bidirectional``."""
        return cast(Placement, self._native.placement)

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return self._native.num_ranks

    @property
    def num_stages(self) -> int:
        """How many slices the model is cut into."""
        return self._native.num_stages

    @property
    def num_microbatches(self) -> int:
        """How many micro-batches one step has."""
        return self._native.num_microbatches

    def actions(self, rank: int) -> list[str]:
        """A rank's actions as text, in order."""
        return self._native.actions(rank)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank holds, in the order in which its modules are given."""
        return self._native.stages_of(rank)

    def mirror_of(self, rank: int) -> int | None:
        """The rank that holds the other copy of a rank's stages, where there is one."""
        return self._native.mirror_of(rank)

    def microbatches_at(self, stage: int, rank: int) -> list[int]:
        """The micro-batches whose ``stage`` runs on ``rank``, ascending."""
        return self._native.microbatches_at(stage, rank)

    def to_csv(self, path: PathLike) -> None:
        """Writes the schedule: a line for each rank, actions separated by commas."""
        Path(path).write_text(self._native.to_csv())

    def lower(
        self,
        *,
        lookahead: int = 2,
        keep_overlap: bool = False,
        with_backward: bool = True,
        reduce_gradients: bool = False,
    ) -> Schedule:
        """Returns this schedule of compute actions with explicit messages, as the engine runs it.

        Args:
            lookahead: how many compute actions ahead of its use a receive is posted.
            keep_overlap: overlapped pairs stay one action, for stages with an
                ``overlapped_forward_backward`` of their own; otherwise they come apart.
            with_backward: ``False`` leaves what inference runs.
            reduce_gradients: adds ``REDUCE_GRAD`` after the last weight gradient of each stage,
                where stages have mirrors.

        Raises:
            ScheduleError: the schedule has messages already, or ``lookahead`` is negative.
        """
        return Schedule(
            self._native.lower(
                lookahead=lookahead,
                keep_overlap=keep_overlap,
                with_backward=with_backward,
                reduce_gradients=reduce_gradients,
            )
        )

    def verify(self) -> None:
        """Proves the schedule.

        Every stage has one F and one B (or I and W) for each micro-batch, on the right rank, after
        what it needs. With messages, also: each channel sends and receives in one order, and no rank
        waits for ever.

        Raises:
            ScheduleError: names the first few violations and draws where the first one is.
        """
        self._native.verify()

    def diagnostics(self) -> list[Diagnostic]:
        """What :meth:`verify` finds, at most 64 mistakes; empty for a sound schedule."""
        return [Diagnostic(*found) for found in self._native.diagnostics()]

    def simulate(
        self, costs: CostModel | None = None, sends: Literal["early", "late"] = "early"
    ) -> Timeline:
        """Runs this schedule of compute actions against a cost model.

        Args:
            costs: durations; left out: F = I = W = 1, and messages take no time.
            sends: ``early``, as the engine runs it: results leave before weights, and a serial pair
                waits for each input where it uses it. ``late``, as published: pairs wait for both
                inputs, and every backward sends at its end.

        Raises:
            ScheduleError: a duration is negative or not finite, or there are not as many as stages.
            ValueError: ``sends`` is neither.
        """
        if sends not in ("early", "late"):
            raise ValueError(f'sends is {sends!r}; use "early" or "late"')
        costs = costs or CostModel()
        native_costs = _C.CostModel(
            forward=costs.forward,
            backward_input=costs.backward_input,
            backward_weight=costs.backward_weight,
            overlapped=costs.overlapped,
            latency=costs.latency,
            message_time=costs.message_time,
        )
        when = _C.Sends.EARLY if sends == "early" else _C.Sends.LATE
        return Timeline(self._native.simulate(native_costs, when))

    def peak_activations(self, rank: int) -> int:
        """The most micro-batches whose activations a rank holds at once, from F to B or W."""
        return self._native.peak_activations(rank)

    def grid(self, rank: int | None = None, step: int = -1) -> str:
        """A line for each rank and a column for each step.

        Args:
            rank: draws only the neighbourhood of this rank; ``None``: everything.
            step: the step of ``rank`` to draw around, marked ``>0F3<``.
        """
        return self._native.grid(rank, step)

    def digest(self) -> int:
        """A 64-bit number that is the same on every machine for the same schedule."""
        return self._native.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self._native == other._native

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return (
            f"Schedule({self.name!r}, num_ranks={self.num_ranks}, num_stages={self.num_stages}, "
            f"num_microbatches={self.num_microbatches}, placement={self.placement!r})"
        )


def plan(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int = 0) -> Schedule:
    """A verified schedule of compute actions.

    Args:
        name: one of :func:`schedules`, such as ``dualpipe`` or ``1f1b``.
        num_ranks: ranks of the pipeline.
        num_microbatches: micro-batches of one step.
        stages_per_rank: for ``interleaved_1f1b`` (0: two); the others know theirs.

    Raises:
        ScheduleError: an unknown name, or sizes that the schedule cannot serve.
    """
    return Schedule(_C.plan_schedule(name, num_ranks, num_microbatches, stages_per_rank))


def parse_action(text: str) -> list[Action]:
    """Reads the text of an action; an overlapped pair is two actions, its forward first.

    Raises:
        ScheduleError: the text is malformed; names the column.
    """
    return [Action(*part) for part in _C.parse_action(text)]


def schedules() -> Sequence[PlannerInfo]:
    """All built-in schedules."""
    return [
        PlannerInfo(info.name, info.placement, info.stages_per_rank, info.summary)
        for info in _C.planners()
    ]
