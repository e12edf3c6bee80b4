"""A pipeline that nobody refers to any more is gone at once, and its connections with it.

Nothing of it may be left to the garbage collector, which runs in the middle of another pipeline's
step: there, the end of connections to a GPU may wait for messages of that step.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from faults import PLACES, TEXT, BoomError, Trigger
from mistakes import Call
from models import squared_error
from outcomes import Outcome, attempt
from parity import Job, own_batch, own_stages
from test_training_failures import Failing
from test_training_mistakes import LABELS, make
from test_training_mistakes import TEXT as TOKENS

from dualpipe_ext import DualPipe, Pipeline
from dualpipe_ext.testing import run_ranks


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def is_gone(parts: list[weakref.ref[Any]]) -> bool:
    return all(part() is None for part in parts)


def references(pipeline: Pipeline, *more: object) -> list[weakref.ref[Any]]:
    return [weakref.ref(part) for part in (pipeline, pipeline._engine, *more)]


def no_loss(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return output.detach().sum()


def step(rank: int, num_ranks: int, place: str) -> tuple[Outcome, bool]:
    """(how a step went, whether the pipeline is gone after it)"""
    job = Job("bias", "dualpipe", num_ranks, 8)
    pipeline = Pipeline(own_stages(job, rank), "dualpipe")
    inputs, labels = own_batch(job.plan(), rank, job.microbatches())
    criterion = no_loss if place == "no loss" else squared_error
    keywords = {"num_chunks": 8, "criterion": criterion, "labels": labels}
    call = Call(rank, pipeline, inputs, keywords)
    if place in PLACES:
        plant, culprit, _ = PLACES[place]
        if rank == culprit:
            plant(pipeline, Trigger(2, lambda: BoomError(TEXT)), call)
    outcome = attempt(call.run)
    parts = references(pipeline, *pipeline.module)
    del pipeline, call
    return outcome, is_gone(parts)


@pytest.mark.parametrize("place", ["nowhere", "no loss", *PLACES])
def test_after_a_step(place: str) -> None:
    mistaken = [0, 3] if place == "no loss" else []  # the ranks that compute losses
    for rank, (ending, gone) in enumerate(run_ranks(step, 4, args=(place,))):
        failed = "ValueError" if rank in mistaken else "PipelineError"
        assert ending.error == ("" if place == "nowhere" else failed)
        assert gone


@pytest.mark.parametrize("fails", [False, True])
def test_after_an_update(fails: bool) -> None:
    """Also where the optimizer of a rank raises, which all are told."""

    def train(rank: int, size: int) -> tuple[Outcome, bool]:
        wrapper = make(optimizer=partial(Failing, on=fails and rank == 1))
        outcome = attempt(wrapper.train_step, (TOKENS, LABELS))
        parts = references(wrapper.pipeline, wrapper)
        del wrapper
        return outcome, is_gone(parts)

    for rank, (outcome, gone) in enumerate(run_ranks(train, 2)):
        assert outcome.error == (("PipelineError", "RuntimeError")[rank] if fails else "")
        assert gone


def test_after_ranks_that_raise() -> None:
    parts: list[weakref.ref[Any]] = []

    def train(rank: int, size: int) -> None:
        pipeline = DualPipe([torch.nn.Linear(2, 2) for _ in "01"])
        parts.extend(references(pipeline, *pipeline.module))
        raise ValueError(f"rank {rank} has had enough")

    assert "had enough" in attempt(run_ranks, train, 2).text
    assert len(parts) == 8
    assert is_gone(parts)
