"""Our engine and its peers on the same sleeping stages, ready to be timed in turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from common import Contender
from peers import build_torch_1f1b, build_torch_dualpipev, build_upstream, load_upstream
from places import Cpu, Place, engine_config
from sleeping import (
    FreshResults,
    ReusedResults,
    SleepStage,
    SleepTimes,
    first_element,
    free_loss,
)
from thread_ranks import Span, StartLine, timed_turns
from torch import Tensor

from dualpipe_ext import DualPipe, WeightGradStore
from dualpipe_ext.schedule import CostModel, plan


@dataclass(frozen=True)
class Work:
    """A step of sleeping stages.

    Attributes:
        num_chunks: the number of micro-batches.
        message_bytes: the size of a message between stages.
        times: how long the stages sleep.
        peer_dualpipe: the checkout of upstream, if it takes part.
        place: where stages are.
        transport: what our messages travel over.
        light: whether messages cost the stages themselves nothing, however large they are.
    """

    num_chunks: int = 20
    message_bytes: int = 4096
    times: SleepTimes = field(default_factory=SleepTimes)
    peer_dualpipe: Path | None = None
    place: Place = field(default_factory=Cpu)
    transport: str = "host"
    light: bool = False

    def batch(self, rows: int) -> Tensor:
        """Returns ``rows`` micro-batches of one row, each as large as a message."""
        if self.light:  # all in the memory of one
            row = torch.zeros(1, self.message_bytes // 4, device=self.place.device)
            return row.expand(rows, -1)
        return torch.zeros(rows, self.message_bytes // 4, device=self.place.device)

    def stages(self, store: Any) -> list[SleepStage]:
        """Returns the two stages of a rank, for an engine with this ``WeightGradStore``."""
        self.place.prepare()
        results = ReusedResults if self.light else FreshResults
        made = [
            SleepStage(self.times, store, sleep=self.place.sleep, results=results()) for _ in "01"
        ]
        return [stage.to(self.place.device) for stage in made]

    def makespan(
        self,
        schedule: str,
        num_ranks: int,
        sends: Literal["early", "late"],
        latency: float = 0.0,
        message_time: float = 0.0,
    ) -> float:
        """Returns the simulated seconds of a step over links with this latency and message time."""
        cost = CostModel(
            forward=self.times.forward,
            backward_input=self.times.backward_input,
            backward_weight=self.times.backward_weight,
            latency=latency,
            message_time=message_time,
        )
        planned = plan(schedule, num_ranks=num_ranks, num_microbatches=self.num_chunks)
        return planned.simulate(cost, sends=sends).makespan

    def paper(self, schedule: str, num_ranks: int) -> dict[str, float]:
        """Returns the simulated makespans, and the seconds for which each rank is busy."""
        stages_a_rank = 2 if schedule == "dualpipev" else 1
        sleep = self.times.forward + self.times.backward_input + self.times.backward_weight
        return {
            "early": self.makespan(schedule, num_ranks, "early"),
            "late": self.makespan(schedule, num_ranks, "late"),
            "busy": self.num_chunks * stages_a_rank * sleep,
        }


def sleeping_contenders(rank: int, num_ranks: int, work: Work) -> list[Contender]:
    """Builds every contender on this rank."""
    contenders = [ours(rank, num_ranks, work)]
    if work.peer_dualpipe is not None:
        contenders.append(upstream(rank, num_ranks, work, work.peer_dualpipe))
    return [*contenders, torch_dualpipev(rank, num_ranks, work), torch_1f1b(rank, num_ranks, work)]


def timed_ours(
    rank: int, num_ranks: int, start_line: StartLine, works: Sequence[Work], repeats: int
) -> list[list[Span]]:
    """Runs steps of our pipeline on a rank that is a thread, in turns one for each of ``works``."""
    step = ours_model(works[0]).step
    steps = [bidirectional_step(step, rank, num_ranks, work) for work in works]
    return timed_turns(steps, repeats, start_line, works[0].place)


def ours_model(work: Work) -> DualPipe:
    """Builds our DualPipe on this rank."""
    return DualPipe(work.stages(WeightGradStore), config=engine_config(work.transport))


def ours(rank: int, num_ranks: int, work: Work) -> Contender:
    """Builds our DualPipe as a contender."""
    step = bidirectional_step(ours_model(work).step, rank, num_ranks, work)
    facts = work.paper("dualpipe", num_ranks)
    settle = work.place.finish
    return Contender("dualpipe_ext DualPipe", step, facts, is_ours=True, settle=settle)


def upstream(rank: int, num_ranks: int, work: Work, checkout: Path) -> Contender:
    """Builds upstream's DualPipe."""
    package = load_upstream(checkout, work.place.device)
    shape = tuple(work.batch(1).shape)
    model = build_upstream(package, work.stages(package.WeightGradStore), shape)
    settle = work.place.finish
    step = bidirectional_step(model.step, rank, num_ranks, work)
    return Contender("upstream DualPipe", step, work.paper("dualpipe", num_ranks), settle=settle)


def bidirectional_step(
    step: Callable[..., object], rank: int, num_ranks: int, work: Work
) -> Callable[[], object]:
    """Returns a step that feeds both ends, by the interface that ours and upstream's share."""
    is_end = rank in (0, num_ranks - 1)
    data = work.batch(work.num_chunks // 2) if is_end else None
    criterion = free_loss if work.light else first_element
    return lambda: step(data, num_chunks=work.num_chunks, criterion=criterion, labels=(data,))


def torch_dualpipev(rank: int, num_ranks: int, work: Work) -> Contender:
    """Builds torch's DualPipeV. Each of its stages sleeps as long: twice the work per rank."""
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
    """Builds torch's 1F1B."""
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
