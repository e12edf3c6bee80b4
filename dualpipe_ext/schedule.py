"""Schedules as data: plan them, prove them, lower them to messages, simulate them.

>>> from dualpipe_ext.schedule import CostModel, plan
>>> schedule = plan("dualpipe", num_ranks=4, num_microbatches=8)
>>> schedule.actions(0)[:4]
['0F0', '0F1', '0F2', '3F4']
>>> schedule.simulate(CostModel(), sends="early").bubble(0)
1.0

Actions are written as in ``torch.distributed.pipelining``: stage, operation, micro-batch.
Operations are ``F`` (forward), ``I`` (backward for inputs), ``W`` (backward for weights), ``B``
(both), ``(0F7;7B13)OVERLAP_F_B`` (a forward and a backward of different micro-batches as one),
``SEND_F``, ``RECV_F``, ``SEND_B``, ``RECV_B`` and ``REDUCE_GRAD``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Literal, NamedTuple, SupportsIndex, cast

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
    """The number of stages per rank; 0: any number."""
    summary: str
    """One line of text, with the source."""


@dataclass(frozen=True)
class Diagnostic:
    """One mistake in a schedule."""

    rank: int
    step: int
    """Index into the rank's actions; -1: the whole rank."""
    text: str


class Action(NamedTuple):
    """A computation, a message or a reduction of one stage."""

    op: str
    """The operation as in the text: ``F``, ``SEND_F``, ..."""
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
    """How long things take, in any one unit of time.

    The duration of F, I or W is one number for all stages, or a sequence with one for each stage.

    Raises:
        ScheduleError: (in ``simulate``) a duration is negative or not finite, or a sequence does
            not have one for each stage.
    """

    forward: float | Sequence[float] = 1.0
    backward_input: float | Sequence[float] = 1.0
    backward_weight: float | Sequence[float] = 1.0
    overlapped: float | None = None
    """A forward and a backward as one overlapped piece; ``None``: their parts run one by one."""
    latency: float = 0.0
    """The time from the end of a message at the sender to its arrival."""
    message_time: float = 0.0
    """How long a message occupies its channel: bytes over bandwidth."""


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
        """The number of ranks."""
        return self._native.num_ranks

    def spans(self, rank: int) -> list[Span]:
        """Returns a rank's compute actions in order, with their times."""
        return [Span(*span) for span in self._native.spans(rank)]

    def busy(self, rank: int) -> float:
        """Returns how long a rank computes."""
        return self._native.busy(rank)

    def bubble(self, rank: int) -> float:
        """Returns the makespan minus the time for which a rank computes."""
        return self._native.bubble(rank)

    def peak_activations(self, rank: int) -> int:
        """Returns the most micro-batches whose activations a rank holds at once, F to B or W."""
        return self._native.peak_activations(rank)

    def grid(self, unit: float = 0.25) -> str:
        """Draws one line per rank and one character per ``unit`` of time; bubbles are dots."""
        return self._native.grid(unit)

    def to_chrome_trace(self, path: PathLike, microseconds_per_unit: float = 1000.0) -> None:
        """Writes JSON for ``chrome://tracing`` or Perfetto, with one thread per rank."""
        Path(path).write_text(self._native.to_chrome_trace(microseconds_per_unit))


class Schedule:
    """What every rank does, in order. Immutable; comparisons ignore the name."""

    def __init__(self, native: _C.Schedule) -> None:
        self._native = native

    @classmethod
    def from_csv(
        cls, path: PathLike, placement: Placement = "loop", num_stages: int | None = None
    ) -> Schedule:
        """Reads a schedule: one line per rank, actions separated by commas, empty cells allowed.

        Args:
            path: the file; ``torch.distributed.pipelining`` writes and reads the same format.
            placement: where stages live: ``loop``, ``v`` or ``bidirectional``.
            num_stages: the number of stages of the whole model; defaults to one per rank (``loop``
                and ``bidirectional``) or two per rank (``v``).

        Raises:
            ScheduleError: a malformed cell (with line and column), sizes that the placement does
                not support, or an invalid schedule (see :meth:`verify`).
        """
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets begin with a mark
        if num_stages is None:
            num_stages = len(text.rstrip().splitlines()) * (2 if placement == "v" else 1)
        _check_sizes(num_stages=num_stages)
        schedule = cls(_C.schedule_from_csv(text, placement, num_stages))
        schedule._native.name = Path(path).stem
        schedule.verify()
        return schedule

    @property
    def native(self) -> _C.Schedule:
        """The native object, which the engine takes."""
        return self._native

    @property
    def name(self) -> str:
        """The name of the planner or of the file."""
        return self._native.name

    @property
    def placement(self) -> Placement:
        """Where stages live: ``loop``, ``v`` or ``bidirectional``."""
        return cast(Placement, self._native.placement)

    @property
    def num_ranks(self) -> int:
        """The number of ranks."""
        return self._native.num_ranks

    @property
    def num_stages(self) -> int:
        """The number of stages of the whole model."""
        return self._native.num_stages

    @property
    def num_microbatches(self) -> int:
        """The number of micro-batches of one step."""
        return self._native.num_microbatches

    def actions(self, rank: int) -> list[str]:
        """Returns a rank's actions as text, in order."""
        return self._native.actions(rank)

    def stages_of(self, rank: int) -> list[int]:
        """Returns the stages that a rank holds, in the order in which its modules are given."""
        return self._native.stages_of(rank)

    def mirror_of(self, rank: int) -> int | None:
        """Returns the rank that holds the other copies of a rank's stages, or ``None``."""
        return self._native.mirror_of(rank)

    def microbatches_at(self, stage: int, rank: int) -> list[int]:
        """Returns the micro-batches whose ``stage`` runs on ``rank``, in ascending order."""
        return self._native.microbatches_at(stage, rank)

    def to_csv(self, path: PathLike) -> None:
        """Writes the schedule: one line per rank, actions separated by commas."""
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
            keep_overlap: keep each overlapped pair as one action, for stages with an
                ``overlapped_forward_backward`` of their own; otherwise pairs are split.
            with_backward: ``False`` keeps only what inference runs.
            reduce_gradients: add ``REDUCE_GRAD`` after the last weight gradient of each stage, if
                stages have mirrors.

        Raises:
            ScheduleError: the schedule already has messages, or ``lookahead`` is negative.
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
        """Proves that the schedule is valid.

        Every stage has one F and one B (or I and W) for each micro-batch, or one F alone in a schedule
        for inference, on the right rank, after everything it depends on. If there are messages, each
        channel also sends and receives in the same order, and no rank waits forever.

        Raises:
            ScheduleError: names the first few violations and draws the place of the first one.
        """
        self._native.verify()

    def diagnostics(self) -> list[Diagnostic]:
        """Returns what :meth:`verify` finds, at most 64 mistakes; empty for a valid schedule."""
        return [Diagnostic(*found) for found in self._native.diagnostics()]

    def simulate(
        self, costs: CostModel | None = None, sends: Literal["early", "late"] = "early"
    ) -> Timeline:
        """Simulates this schedule of compute actions under a cost model.

        Args:
            costs: durations; by default F = I = W = 1, and messages take no time.
            sends: ``early``, as the engine runs it: results are sent before weight gradients are
                computed, and a serial pair waits for each input only where it is used. ``late``, as
                published: pairs wait for both inputs, and every backward sends at its end.

        Raises:
            ScheduleError: a duration is negative or not finite, or a sequence of durations does not
                have one for each stage.
            ValueError: ``sends`` is neither ``early`` nor ``late``.
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
        """Returns the most micro-batches whose activations a rank holds at once, F to B or W."""
        return self._native.peak_activations(rank)

    def grid(self, rank: int | None = None, step: int = -1) -> str:
        """Draws one line per rank and one column per step.

        Args:
            rank: draw only the neighbourhood of this rank; ``None``: everything.
            step: the step of ``rank`` to draw around, marked as in ``>0F3<``.
        """
        return self._native.grid(rank, step)

    def digest(self) -> int:
        """Returns a 64-bit number that is the same on every machine for the same schedule."""
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
    """Plans and verifies a schedule of compute actions.

    Args:
        name: one of :func:`schedules`, such as ``dualpipe`` or ``1f1b``.
        num_ranks: the number of ranks of the pipeline.
        num_microbatches: the number of micro-batches of one step.
        stages_per_rank: only for ``interleaved_1f1b`` (0: two); all others have a fixed number.

    Raises:
        ScheduleError: an unknown name, or sizes that the schedule does not support.
        TypeError: a size is not an int.
    """
    _check_sizes(
        num_ranks=num_ranks, num_microbatches=num_microbatches, stages_per_rank=stages_per_rank
    )
    return Schedule(_C.plan_schedule(name, num_ranks, num_microbatches, stages_per_rank))


def _check_sizes(**sizes: int) -> None:
    for size, value in sizes.items():
        if not isinstance(value, SupportsIndex) or isinstance(value, bool):
            raise TypeError(f"{size}={value!r}: it must be an int")
        if abs(index(value)) >= 1 << 31:
            raise ScheduleError(f"{size}={value} is too large: sizes have 31 bits")


def parse_action(text: str) -> list[Action]:
    """Parses the text of an action; an overlapped pair is two actions, the forward first.

    Raises:
        ScheduleError: the text is malformed; names the column.
    """
    return [Action(*part) for part in _C.parse_action(text)]


def schedules() -> Sequence[PlannerInfo]:
    """Returns all built-in schedules."""
    return [
        PlannerInfo(info.name, info.placement, info.stages_per_rank, info.summary)
        for info in _C.planners()
    ]
