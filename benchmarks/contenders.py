"""Ours and its peers on the same sleeping stages, ready to be timed in turns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from common import Contender
from peers import build_torch_1f1b, build_torch_dualpipev, build_upstream, load_upstream
from sleeping import SleepStage, SleepTimes, first_element
from torch import Tensor

from dualpipe_ext import DualPipe, WeightGradStore
from dualpipe_ext.schedule import CostModel, plan


@dataclass(frozen=True)
class Work:
    """A step of sleeping stages.

    Attributes:
        num_chunks: Number of micro-batches.
        message_bytes: Size of a message between stages.
        times: How long the stages sleep.
        peer_dualpipe: Checkout of upstream, if it takes part.
    """

    num_chunks: int = 20
    message_bytes: int = 4096
    times: SleepTimes = field(default_factory=SleepTimes)
    peer_dualpipe: Path | None = None

    def batch(self, rows: int) -> Tensor:
        """Return ``rows`` micro-batches of one row, each as large as a message."""
        return torch.zeros(rows, self.message_bytes // 4)

    def makespan(self, schedule: str, num_ranks: int, sends: Literal["early", "late"]) -> float:
        """Return the simulated seconds of a step, were messages free."""
        cost = CostModel(
            forward=self.times.forward,
            backward_input=self.times.backward_input,
            backward_weight=self.times.backward_weight,
        )
        planned = plan(schedule, num_ranks=num_ranks, num_microbatches=self.num_chunks)
        return planned.simulate(cost, sends=sends).makespan

    def paper(self, schedule: str, num_ranks: int) -> dict[str, float]:
        """Return the makespans on paper, and the seconds that each rank is busy."""
        stages_a_rank = 2 if schedule == "dualpipev" else 1
        sleep = self.times.forward + self.times.backward_input + self.times.backward_weight
        return {
            "early": self.makespan(schedule, num_ranks, "early"),
            "late": self.makespan(schedule, num_ranks, "late"),
            "busy": self.num_chunks * stages_a_rank * sleep,
        }


def sleeping_contenders(rank: int, num_ranks: int, work: Work) -> list[Contender]:
    """Build every contender on this rank."""
    contenders = [ours(rank, num_ranks, work)]
    if work.peer_dualpipe is not None:
        contenders.append(upstream(rank, num_ranks, work, work.peer_dualpipe))
    return [*contenders, torch_dualpipev(rank, num_ranks, work), torch_1f1b(rank, num_ranks, work)]


def ours(rank: int, num_ranks: int, work: Work) -> Contender:
    """Build our DualPipe."""
    model = DualPipe([SleepStage(work.times, WeightGradStore) for _ in range(2)])
    step = bidirectional_step(model.step, rank, num_ranks, work)
    return Contender("dualpipe_ext DualPipe", step, work.paper("dualpipe", num_ranks), is_ours=True)


def upstream(rank: int, num_ranks: int, work: Work, checkout: Path) -> Contender:
    """Build upstream's DualPipe."""
    package = load_upstream(checkout)
    stages = [SleepStage(work.times, package.WeightGradStore) for _ in range(2)]
    model = build_upstream(package, stages, tuple(work.batch(1).shape))
    step = bidirectional_step(model.step, rank, num_ranks, work)
    return Contender("upstream DualPipe", step, work.paper("dualpipe", num_ranks))


def bidirectional_step(
    step: Callable[..., object], rank: int, num_ranks: int, work: Work
) -> Callable[[], object]:
    """Return a step that feeds both ends, as ours and upstream's interface has it."""
    is_end = rank in (0, num_ranks - 1)
    data = work.batch(work.num_chunks // 2) if is_end else None
    return lambda: step(data, num_chunks=work.num_chunks, criterion=first_element, labels=(data,))


def torch_dualpipev(rank: int, num_ranks: int, work: Work) -> Contender:
    """Build torch's DualPipeV, whose stages sleep as long each: twice the work for a rank."""
    stages = [SleepStage(work.times, weight_runs_apart=True) for _ in range(2)]
    message, batch = work.batch(1).requires_grad_(), work.batch(work.num_chunks)
    schedule = build_torch_dualpipev(
        stages,
        rank,
        num_ranks,
        work.num_chunks,
        first_element,
        [(message, message)] * 2,
        stages[0].weight_runner,
    )
    args, target = ((batch,), batch) if rank == 0 else ((), None)
    step = lambda: schedule.step(*args, target=target, losses=[], return_outputs=False)
    return Contender("torch DualPipeV", step, work.paper("dualpipev", num_ranks))


def torch_1f1b(rank: int, num_ranks: int, work: Work) -> Contender:
    """Build torch's 1F1B."""
    stage = SleepStage(work.times, weight_runs_apart=True)
    message, batch = work.batch(1).requires_grad_(), work.batch(work.num_chunks)
    schedule = build_torch_1f1b(
        stage,
        rank,
        num_ranks,
        work.num_chunks,
        first_element,
        (message, message),
        stage.weight_runner,
    )
    args = (batch,) if rank == 0 else ()
    target = batch if rank == num_ranks - 1 else None
    step = lambda: schedule.step(*args, target=target, losses=[], return_outputs=False)
    return Contender("torch 1F1B", step, work.paper("1f1b", num_ranks))
