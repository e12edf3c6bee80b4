"""step() without gradients: forward alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CASES
from parity import Job, as_tuple, check_equal, join, own_batch, own_stages, run_unsplit

from dualpipe_ext import Pipeline
from dualpipe_ext.testing import run_ranks

SCHEDULES = ["dualpipe", "dualpipev", "1f1b", "gpipe", "zb1p", "interleaved_1f1b", "zbv"]


def infer(rank: int, num_ranks: int, job: Job, how: str) -> tuple[Any, Any, list[str], int]:
    """The very first step of a pipeline, with or without a criterion."""
    pipeline = Pipeline(own_stages(job, rank), job.schedule)
    inputs, labels = own_batch(job.plan(), rank, job.microbatches())
    mode = torch.inference_mode() if how == "inference_mode" else torch.no_grad()
    with mode, job.what().context(job.device_type):
        loss, outputs = pipeline.step(
            *inputs,
            num_chunks=job.num_chunks,
            criterion=None if how == "outputs alone" else job.what().criterion,
            labels=None if how == "outputs alone" else labels,
            return_outputs=True,
        )
    assert all(p.grad is None for p in pipeline.parameters())
    trace = [event.action for event in pipeline.last_trace]
    return loss, outputs, trace, pipeline.stats().peak_live_activations


def check(job: Job, how: str) -> None:
    losses, expected = run_unsplit(job.stages(), job.microbatches(), job.what(), backward=False)
    schedule = job.plan()
    for rank, result in enumerate(run_ranks(infer, job.num_ranks, args=(job, how))):
        loss, outputs, trace, _ = result
        leaving = schedule.microbatches_at(schedule.num_stages - 1, rank)
        num_forwards = sum(len(schedule.microbatches_at(s, rank)) for s in schedule.stages_of(rank))
        assert len(trace) == num_forwards
        assert all("F" in action and "B" not in action for action in trace)
        if not leaving:
            assert loss is None and outputs is None
            continue
        if how == "outputs alone":
            assert loss is None
        else:
            assert torch.equal(loss, torch.stack([losses[m] for m in leaving]))
        assert not any(t is not None and t.requires_grad for t in as_tuple(outputs))
        check_equal(as_tuple(outputs), join(expected[m] for m in leaving), f"rank {rank}")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("how", ["with losses", "outputs alone", "inference_mode"])
def test_inference_comes_first(schedule: str, how: str) -> None:
    stages = 2 if schedule == "interleaved_1f1b" else 0
    check(Job("gpt", schedule, 4, 8, stages), how)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant checkpoints
@pytest.mark.parametrize("name", [name for name in CASES if "dropout" not in name])
def test_inference_of_every_model(name: str) -> None:
    check(Job(name, "dualpipe", 4, 8), "with losses")


def test_outputs_only_on_demand() -> None:
    job = Job("bias", "dualpipe", 2, 4)

    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = Pipeline(own_stages(job, rank), "dualpipe")
        inputs, labels = own_batch(job.plan(), rank, job.microbatches())
        for training in (True, False):
            with torch.set_grad_enabled(training):
                _, outputs = pipeline.step(
                    *inputs, num_chunks=4, criterion=job.what().criterion, labels=labels
                )
            assert outputs is None

    run_ranks(rank_fn, 2)
