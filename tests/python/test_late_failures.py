"""A message from GPU to GPU may fail when its step has returned: parameters must not be updated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from loops import make_batch, make_gpt, make_optimizer, token_loss
from outcomes import Outcome, attempt

from dualpipe_ext import Pipeline, PipelineError, TrainingWrapper, setup_dual_pipe
from dualpipe_ext.testing import run_ranks
from dualpipe_ext.training.replicas import Replicas
from dualpipe_ext.training.side_by_side import StepsSideBySide

Parameters = list[torch.Tensor]


def fail_late(pipeline: Pipeline) -> None:
    """What `synchronize` does on the rank that finds the failure, and so on the others."""
    error = PipelineError("the message was lost")
    pipeline.abandon_step(error)
    raise error


def make(size: int) -> TrainingWrapper:
    model = make_gpt()
    return TrainingWrapper(
        model,
        setup_dual_pipe(model, num_stages=size),
        optimizer=make_optimizer,
        loss_fn=token_loss,
        reduction="token",
        shifts_labels=False,
    )


def failing_late(pipeline: Pipeline) -> AbstractContextManager[Any]:
    """On the last rank, what was issued in here has failed."""
    if pipeline.rank < pipeline.num_ranks - 1:
        return nullcontext()
    return patch.object(pipeline, "synchronize", lambda: fail_late(pipeline))


def look(rank: int, size: int) -> list[Outcome]:
    """What comes of evaluating and predicting."""
    wrapper, batch = make(size), make_batch(8, seed=0)
    with failing_late(wrapper.pipeline):
        return [attempt(wrapper.evaluate, batch), attempt(wrapper.predict, batch)]


def train(rank: int, size: int) -> tuple[Outcome, list[Parameters]]:
    """Three steps, the second of which fails late; the parameters after each."""
    wrapper = make(size)
    pipeline, batch = wrapper.pipeline, make_batch(8, seed=0)
    found: list[Parameters] = []

    def step() -> None:
        try:
            wrapper.train_step(batch)
        finally:
            found.append([each.detach().clone() for each in pipeline.parameters()])

    step()
    with failing_late(pipeline):
        outcome = attempt(step)
    step()
    return outcome, found


@pytest.fixture
def over_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if messages went from GPU to GPU."""
    monkeypatch.setattr(Pipeline, "transport", "nccl")


def test_what_fails_after_the_step_is_no_update(over_gpus: None) -> None:
    for outcome, (first, failed, last) in run_ranks(train, 2, timeout=60):
        assert outcome.is_a("PipelineError") and "the message was lost" in outcome.text, outcome
        assert all(map(torch.equal, first, failed))
        assert not any(map(torch.equal, failed, last))


def test_what_fails_late_is_no_result(over_gpus: None) -> None:
    for outcomes in run_ranks(look, 2, timeout=60):
        for outcome in outcomes:
            assert outcome.is_a("PipelineError") and "the message was lost" in outcome.text, outcome


def test_messages_of_the_host_have_arrived_with_the_step() -> None:
    """Nobody waits for them again."""
    for outcome, _ in run_ranks(train, 2, timeout=60):
        assert outcome.error == "", outcome


class Calls:
    """A pipeline that notes what it is told."""

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.made: list[str] = []

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.made.append(name)


@pytest.mark.parametrize(("transport", "settled"), [("copy", ["synchronize"]), ("host", [])])
def test_gradients_are_settled_when_they_are_summed(transport: str, settled: list[str]) -> None:
    """Within the step and after an accumulation; and so is what is looked at between updates."""
    pipeline: Any = Calls(transport)
    steps = StepsSideBySide(pipeline, Replicas(None))
    assert steps.run(lambda sums: sums, sums_gradients=True)
    assert pipeline.made == settled
    assert not steps.run(lambda sums: sums, sums_gradients=False)
    assert pipeline.made == settled
    steps.sync_gradients()
    assert pipeline.made == [*settled, "sync_gradients", *settled]
    steps.settle()
    assert pipeline.made == [*settled, "sync_gradients", *settled, *settled]
