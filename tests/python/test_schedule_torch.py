"""The compute order of the installed torch's own generators is ours.

No process group is needed: the generators look at nothing but sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as torch_schedules

from dualpipe_ext.schedule import plan

SIZES = [
    (num_ranks, num_microbatches)
    for num_ranks in (1, 2, 3, 4, 5, 8, 16)
    for num_microbatches in sorted({1, 2, 3, 7, 8, 2 * num_ranks, 2 * num_ranks + 1, 20, 33, 48})
]


def generated(
    schedule_class: type[Any], num_ranks: int, num_microbatches: int, **sizes: Any
) -> Any:
    """A torch schedule with the sizes that its generator of one rank's actions reads."""
    schedule = object.__new__(schedule_class)
    schedule.pp_group_size = num_ranks
    schedule._n_microbatches = num_microbatches
    vars(schedule).update(sizes)
    return schedule


def rank_texts(schedule: Any, rank: int) -> list[str]:
    schedule.rank = rank
    actions = schedule._calculate_single_rank_operations(rank)
    return [str(action) for action in actions if action is not None]


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_zbv(num_ranks: int, num_microbatches: int) -> None:
    theirs = generated(
        torch_schedules.ScheduleZBVZeroBubble,
        num_ranks,
        num_microbatches,
        num_stages=2 * num_ranks,
    )
    ours = plan("zbv", num_ranks, num_microbatches)
    for rank in range(num_ranks):
        assert ours.actions(rank) == rank_texts(theirs, rank)


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches"), [size for size in SIZES if size[1] >= 2 * size[0]]
)
def test_dualpipev(num_ranks: int, num_microbatches: int) -> None:
    theirs = generated(torch_schedules.ScheduleDualPipeV, num_ranks, num_microbatches)
    ours = plan("dualpipev", num_ranks, num_microbatches)
    for rank in range(num_ranks):
        assert ours.actions(rank) == rank_texts(theirs, rank)


@pytest.mark.parametrize("stages_per_rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches"),
    [size for size in SIZES if size[1] % max(1, size[1] // size[0]) == 0],
)
def test_interleaved_1f1b(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    rounds = max(1, num_microbatches // num_ranks)
    theirs = generated(
        torch_schedules.ScheduleInterleaved1F1B,
        num_ranks,
        num_microbatches,
        n_local_stages=stages_per_rank,
        number_of_rounds=rounds,
        microbatches_per_round=num_microbatches // rounds,
    )
    ours = plan("interleaved_1f1b", num_ranks, num_microbatches, stages_per_rank)
    for rank in range(num_ranks):
        assert ours.actions(rank) == rank_texts(theirs, rank)


class RecordingStage:
    """Stands for a pipeline stage and writes down what it is asked to compute."""

    is_first = is_last = False

    def __init__(self, stage_index: int) -> None:
        self.stage_index = stage_index
        self.texts: list[str] = []

    def forward_one_chunk(self, microbatch: int, *_: Any, **__: Any) -> torch.Tensor:
        self.texts.append(f"{self.stage_index}F{microbatch}")
        return torch.empty(0)

    def backward_one_chunk(self, microbatch: int, **_: Any) -> None:
        self.texts.append(f"{self.stage_index}B{microbatch}")

    def perform_reduce_grad(self, _: int) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        if name.startswith("get_") and name.endswith("_ops"):
            return lambda *_: []  # no messages
        raise AttributeError(name)


def executed(
    schedule_class: type[Any], num_ranks: int, num_microbatches: int, rank: int
) -> list[str]:
    """What one rank of a single-stage torch schedule computes when it is run.

    ``Schedule1F1B._get_pipeline_order`` numbers the last rank's micro-batches from 1, which is not
    what its ``step`` does; ``step`` is what counts.
    """
    schedule: Any = object.__new__(schedule_class)
    stage = RecordingStage(rank)
    vars(schedule).update(
        _stage=stage,
        _num_stages=num_ranks,
        _n_microbatches=num_microbatches,
        _has_backward=True,
        _loss_fn=None,
        _internal_losses=[],
        _stage_initialized=True,
        _stage_forward_initialized=True,
        _stage_backward_initialized=True,
        scale_grads=True,
        _initialize_stage=lambda *_: None,
    )
    microbatches = [()] * num_microbatches
    schedule._step_microbatches(microbatches, [{}] * num_microbatches)
    return stage.texts


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
@pytest.mark.parametrize(
    ("name", "schedule_class"),
    [("1f1b", torch_schedules.Schedule1F1B), ("gpipe", torch_schedules.ScheduleGPipe)],
)
def test_single_stage_schedules(
    name: str, schedule_class: type[Any], num_ranks: int, num_microbatches: int
) -> None:
    ours = plan(name, num_ranks, num_microbatches)
    for rank in range(num_ranks):
        assert ours.actions(rank) == executed(schedule_class, num_ranks, num_microbatches, rank)


def test_torch_reads_our_text() -> None:
    for name in ("dualpipe", "dualpipev", "zbv"):
        lowered = plan(name, 4, 8).lower(reduce_gradients=True)
        kept = plan(name, 4, 8).lower(keep_overlap=True)
        for schedule in (lowered, kept):
            for rank in range(schedule.num_ranks):
                for text in schedule.actions(rank):
                    assert str(torch_schedules._Action.from_str(text)) == text
