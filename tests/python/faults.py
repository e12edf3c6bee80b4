"""Stages, criteria and hooks that fail at a chosen moment, and the step around them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from mistakes import Call, is_right
from models import squared_error
from outcomes import Outcome, attempt
from parity import Job, own_batch, own_stages
from torch import Tensor, nn

from dualpipe_ext import DualPipeConfig, Pipeline, WeightGradStore

TEXT = "the cable is loose"


class BoomError(Exception):
    """What the user's code raises."""


class Trigger:
    """Raises on its n-th pull, once."""

    def __init__(self, countdown: int, error: Callable[[], BaseException]) -> None:
        self.countdown = countdown
        self.error = error

    def pull(self) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            raise self.error()


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Trigger) -> Tensor:
        ctx.trigger = trigger
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.trigger.pull()
        return grads[0], None


class _InWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Trigger) -> Tensor:
        ctx.trigger = trigger
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if WeightGradStore.enabled:
            WeightGradStore.put(ctx.trigger.pull)
        return grads[0], None


def _plant_forward(pipeline: Pipeline, trigger: Trigger, call: Call) -> None:
    pipeline.module[0].register_forward_pre_hook(lambda *_: trigger.pull())


def _plant_function(function: Any) -> Callable[[Pipeline, Trigger, Call], None]:
    def plant(pipeline: Pipeline, trigger: Trigger, call: Call) -> None:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            replaced: Tensor = function.apply(output, trigger)
            return replaced

        for module in pipeline.module:
            module.register_forward_hook(hook)

    return plant


def _plant_criterion(pipeline: Pipeline, trigger: Trigger, call: Call) -> None:
    def criterion(output: Tensor, target: Tensor) -> Tensor:
        trigger.pull()
        return squared_error(output, target)

    call.keywords["criterion"] = criterion


def _plant_before_backward(pipeline: Pipeline, trigger: Trigger, call: Call) -> None:
    pipeline.register_before_backward_hook(lambda *_: trigger.pull())


def _plant_after_forward(pipeline: Pipeline, trigger: Trigger, call: Call) -> None:
    pipeline.register_after_forward_hook(lambda *_: trigger.pull())


# Where the error is raised: how it is planted, on which rank of 4, what the action looks like.
PLACES: dict[str, tuple[Callable[[Pipeline, Trigger, Call], None], int, str]] = {
    "forward": (_plant_forward, 2, r"2F\d"),
    "backward": (_plant_function(_InBackward), 1, r"[12][BI]\d"),
    "weight": (_plant_function(_InWeight), 2, r"[12]W\d"),
    "criterion": (_plant_criterion, 0, r"3F\d"),
    "before backward hook": (_plant_before_backward, 3, r"3F\d"),
    "after forward hook": (_plant_after_forward, 0, r"3F\d"),
}


def _boom() -> BaseException:
    return BoomError(TEXT)


def fail_at(
    rank: int,
    num_ranks: int,
    place: str,
    countdown: int,
    error: Callable[[], BaseException] = _boom,
) -> tuple[Outcome, bool]:
    """(how the step went, whether the next one was right) on one rank."""
    job = Job("bias", "dualpipe", num_ranks, 8)
    pipeline = Pipeline(own_stages(job, rank), "dualpipe", config=DualPipeConfig(timeout=30.0))

    def call() -> Call:
        inputs, labels = own_batch(job.plan(), rank, job.microbatches())
        keywords = {"num_chunks": 8, "criterion": squared_error, "labels": labels}
        return Call(rank, pipeline, inputs, keywords)

    plant, culprit, _ = PLACES[place]
    spoiled = call()
    if rank == culprit:
        plant(pipeline, Trigger(countdown, error), spoiled)
    outcome = attempt(spoiled.run)
    return outcome, is_right(job, rank, call())


def check_failure(place: str, results: list[Outcome], cause: str = "BoomError") -> None:
    """Every rank was told rank, action and text, and was right in the next step."""
    _, culprit, action = PLACES[place]
    for rank, result in enumerate(results):
        assert not result.error, f"rank {rank}: {result.error}: {result.text}"
        outcome, next_is_right = result.value
        assert outcome.error == "PipelineError", f"rank {rank}: {outcome.error}: {outcome.text}"
        assert outcome.seconds < 5.0, f"rank {rank} took {outcome.seconds} s"
        assert re.search(rf"rank {culprit}, step 1, action \d+ of \d+: {action}", outcome.text), (
            f"rank {rank}: {outcome.text}"
        )
        assert TEXT in outcome.text, f"rank {rank}: {outcome.text}"
        assert re.search(r">\S+<", outcome.text), f"rank {rank}: no mark in {outcome.text}"
        if rank == culprit:
            assert outcome.cause == cause and TEXT in outcome.cause_text
        else:
            assert outcome.cause == "", f"rank {rank}"
            assert f"noticed by rank {rank}" in outcome.text
        assert next_is_right, f"rank {rank}: the step after the failure is wrong"
