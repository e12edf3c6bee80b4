"""Stages that turn out uneven in training: what is reported, and when it is warned of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from busy_machine import holds_in_one_of
from plain_models import WIDTH
from slow_models import slow_model
from torch import Tensor, nn
from torch.optim import SGD

from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline, TrainingWrapper
from dualpipe_ext.adapters import Cost, Imbalance, get_model_adapter, report_imbalance
from dualpipe_ext.testing import run_ranks

pytestmark = pytest.mark.measures


def imbalance(milliseconds: Sequence[float], sizes: Sequence[int]) -> Imbalance:
    def train(rank: int, size: int) -> Imbalance:
        adapter = get_model_adapter(slow_model(milliseconds))
        partition = adapter.partition(size, balance=sizes, show=False)[rank]
        pipeline = DualPipe([partition, partition])
        with pytest.raises(ValueError, match="no training step yet"):
            report_imbalance(pipeline)
        x = torch.ones(4, 2) if rank in (0, size - 1) else None
        pipeline.step(x, num_chunks=8, criterion=Tensor.sum, labels=())
        return report_imbalance(pipeline)

    first, *others = run_ranks(train, 4)
    assert all(other == first for other in others)
    return first  # type: ignore[no-any-return]


def test_reports_the_layer_to_move() -> None:
    def check() -> None:
        report = imbalance([2] * 8, [3, 1, 2, 2])
        assert (report.slowest, report.layer, report.better_sizes) == (0, "2", (2, 2, 2, 2))
        assert report.gain > 0.1
        assert "stage 0 is the slowest" in str(report)
        assert "move 2: balance=[2, 2, 2, 2] in place of [3, 1, 2, 2]" in str(report)

    holds_in_one_of(5, check)


def even(pipeline: Pipeline) -> list[Cost]:
    """Stages in place of measured ones, which noise makes uneven."""
    return [Cost(1e-3, 1e-3, 1e-3)] * pipeline.num_stages


def test_reports_that_no_move_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualpipe_ext.adapters.imbalance._measured", even)
    model = get_model_adapter(slow_model([0] * 8))
    partition = model.partition(2, balance=[4, 4], show=False)[0]

    def report(rank: int, size: int) -> Imbalance:
        return report_imbalance(DualPipe([partition, partition]))

    for found in run_ranks(report, 2):
        assert found.layer is None and found.better_sizes == (4, 4)
        assert "would not help" in str(found)


def warned(sizes: Sequence[int], num_steps: int) -> list[str]:
    """By a training loop over eight equal layers."""

    def train(rank: int, size: int) -> None:
        config = DualPipeConfig(balance=sizes, num_microbatches=8)
        wrapper = TrainingWrapper(slow_model([2] * 8), config, SGD, loss_fn=Tensor.sum)
        for _ in range(num_steps):
            wrapper.train_step(((torch.ones(8, 2),), ()))

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_ranks(train, 4)
    return [str(each.message) for each in told if "the stages are uneven" in str(each.message)]


def test_training_warns_of_uneven_stages_once() -> None:
    def check() -> None:
        texts = warned([3, 1, 2, 2], num_steps=7)
        assert len(texts) == 1
        assert "move 2: balance=[2, 2, 2, 2] in place of [3, 1, 2, 2]" in texts[0]
        assert "balance='time'" in texts[0]

    holds_in_one_of(5, check)


def test_training_does_not_warn_of_even_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def measured(pipeline: Pipeline) -> list[Cost]:
        seen.append(pipeline.num_steps)
        return even(pipeline)

    monkeypatch.setattr("dualpipe_ext.adapters.imbalance._measured", measured)
    assert warned([2, 2, 2, 2], num_steps=6) == []
    assert sorted(seen) == [3] * 4 + [4] * 4 + [5] * 4


@pytest.mark.parametrize(("schedule", "steps"), [("dualpipe", [2, 3, 4]), ("1f1b", [])])
def test_the_steps_that_are_looked_at_are_timed_by_the_device(
    schedule: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs marks, and a wait at the end of each: the other steps are left alone."""
    asked: list[int] = []
    monkeypatch.setattr(Pipeline, "time_next_step", lambda self: asked.append(self.num_steps))

    def train(rank: int, size: int) -> None:
        config = DualPipeConfig(schedule=schedule, num_microbatches=4)
        wrapper = TrainingWrapper(slow_model([0] * 4), config, SGD, loss_fn=Tensor.sum)
        for _ in range(7):
            wrapper.train_step(((torch.ones(4, 2),), ()))

    run_ranks(train, 2)
    assert sorted(asked) == sorted(steps * 2)


def test_times_of_issuing_work_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose steps were timed by the host; one rank suffices."""
    monkeypatch.setattr(
        "dualpipe_ext.adapters.imbalance._is_issue",
        lambda pipeline: pipeline.rank == 1 and bool(pipeline.last_trace),
    )
    with pytest.raises(ValueError, match=r"knows when it issued.*pipeline.times_device = True"):
        imbalance([1] * 8, [2, 2, 2, 2])


def test_reports_on_partitions_alone() -> None:
    def train(rank: int, size: int) -> None:
        with pytest.raises(ValueError, match="whose modules are partitions"):
            report_imbalance(DualPipe([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]))

    run_ranks(train, 2)
