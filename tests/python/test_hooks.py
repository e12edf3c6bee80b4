"""Hooks around losses: scale, add, look; and hooks of parameters and modules within a step."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from parity import Job, check_equal, gradients_of, own_batch, own_stages, run_unsplit
from torch import Tensor, nn

from dualpipe_ext import Pipeline
from dualpipe_ext.testing import run_ranks


def step(pipeline: Pipeline, rank: int, job: Job) -> Tensor | None:
    inputs, labels = own_batch(job.plan(), rank, job.microbatches())
    loss, _ = pipeline.step(
        *inputs, num_chunks=job.num_chunks, criterion=job.what().criterion, labels=labels
    )
    if torch.is_grad_enabled():
        pipeline.sync_gradients()
    return loss


def scaled_gradients(job: Job, scale: float) -> list[dict[str, Tensor | None]]:
    stages = job.stages()
    run_unsplit(stages, job.microbatches(), job.what())
    found = []
    for stage in stages:
        found.append({k: None if g is None else g * scale for k, g in gradients_of(stage).items()})
    return found


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb1p"])
def test_before_backward_scales_what_is_differentiated(schedule: str) -> None:
    job = Job("bias", schedule, 2, 4, dtype=torch.float64)

    def rank_fn(rank: int, num_ranks: int) -> Any:
        pipeline = Pipeline(own_stages(job, rank), schedule)
        plain = step(pipeline, rank, job)
        pipeline.zero_grad()
        pipeline.register_before_backward_hook(lambda loss, microbatch: loss * 4)
        handle = pipeline.register_before_backward_hook(lambda loss, microbatch: loss * 1e6)
        handle.remove()
        pipeline.register_before_backward_hook(lambda loss, microbatch: loss / 8)
        pipeline.register_before_backward_hook(lambda loss, microbatch: None)
        loss = step(pipeline, rank, job)
        check_equal((plain,), (loss,), "losses")  # the criterion's, not the scaled ones
        return dict(zip(pipeline.stages, map(gradients_of, pipeline.module), strict=True))

    expected = scaled_gradients(job, 0.5)
    for gradients in run_ranks(rank_fn, 2):
        for stage, own in gradients.items():
            for name, value in expected[stage].items():
                torch.testing.assert_close(own[name], value, rtol=1e-12, atol=1e-16)


def test_before_backward_adds_an_auxiliary_loss() -> None:
    """By micro-batch: the loss of micro-batch m counts m+1 times."""
    job = Job("bias", "dualpipe", 2, 4, dtype=torch.float64)

    def rank_fn(rank: int, num_ranks: int) -> Any:
        pipeline = Pipeline(own_stages(job, rank), "dualpipe")
        pipeline.register_before_backward_hook(lambda loss, microbatch: loss + loss * microbatch)
        step(pipeline, rank, job)
        return dict(zip(pipeline.stages, map(gradients_of, pipeline.module), strict=True))

    stages = job.stages()
    for index, microbatch in enumerate(job.microbatches()):
        values: Any = microbatch.inputs[0]
        for stage in stages:
            values = stage(values)
        (job.what().criterion(values, *microbatch.labels) * (index + 1)).backward()
    for gradients in run_ranks(rank_fn, 2):
        for number, own in gradients.items():
            for name, value in gradients_of(stages[number]).items():
                torch.testing.assert_close(own[name], value, rtol=1e-12, atol=1e-16)


def test_after_forward_sees_every_loss() -> None:
    job = Job("bias", "dualpipe", 4, 8)

    def rank_fn(rank: int, num_ranks: int) -> Any:
        pipeline = Pipeline(own_stages(job, rank), "dualpipe")
        seen: list[tuple[int, float, tuple[int, ...]]] = []

        def log(loss: Tensor, outputs: Any, microbatch: int) -> None:
            assert not loss.requires_grad
            seen.append((microbatch, float(loss), tuple(outputs[0].shape)))

        handle = pipeline.register_after_forward_hook(log)
        loss = step(pipeline, rank, job)
        with torch.no_grad():
            step(pipeline, rank, job)
        handle.remove()
        pipeline.zero_grad()
        step(pipeline, rank, job)
        return loss, seen

    for rank, (loss, seen) in enumerate(run_ranks(rank_fn, 4)):
        leaving = job.plan().microbatches_at(3, rank)
        assert sorted(m for m, _, _ in seen) == sorted(leaving * 2)
        for microbatch, value, shape in seen:
            assert value == float(loss[leaving.index(microbatch)])
            assert shape == (2, 8)


def test_a_hook_that_returns_something_else() -> None:
    job = Job("bias", "dualpipe", 2, 4)

    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = Pipeline(own_stages(job, rank), "dualpipe")
        if rank == 1:
            pipeline.register_before_backward_hook(lambda loss, microbatch: loss.expand(3))
        step(pipeline, rank, job)

    with pytest.raises(ValueError, match=r"returned shape \(3,\)"):
        run_ranks(rank_fn, 2)


@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_hooks_of_parameters_fire_once_for_each_microbatch(schedule: str) -> None:
    """post_accumulate_grad_hook fires where the gradient is added: in W for deferred layers."""
    job = Job("attention", schedule, 2, 8)
    lock = threading.Lock()

    def rank_fn(rank: int, num_ranks: int) -> Any:
        counts: Counter[str] = Counter()
        pipeline = Pipeline(own_stages(job, rank), schedule)
        for name, parameter in pipeline.named_parameters():

            def count(_: Tensor, name: str = name) -> None:
                with lock:
                    counts[name] += 1

            parameter.register_post_accumulate_grad_hook(count)
        step(pipeline, rank, job)
        gradients = dict(zip(pipeline.stages, map(gradients_of, pipeline.module), strict=True))
        return counts, [name for name, _ in pipeline.named_parameters()], gradients

    expected = scaled_gradients(job, 1.0)
    times = 4 if schedule == "dualpipe" else 8
    for counts, names, gradients in run_ranks(rank_fn, 2):
        assert counts == Counter(dict.fromkeys(names, times))
        for stage, own in gradients.items():
            for name, value in expected[stage].items():
                torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # at the first stage
def test_hooks_of_modules_are_called() -> None:
    job = Job("bias", "dualpipe", 2, 4)

    def rank_fn(rank: int, num_ranks: int) -> Any:
        calls: Counter[str] = Counter()
        stages = own_stages(job, rank)
        for stage in stages:
            for module in stage.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(lambda *_: calls.update(["forward"]))
                    module.register_full_backward_hook(lambda *_: calls.update(["backward"]))
        step(Pipeline(stages, "dualpipe"), rank, job)
        return calls

    for calls in run_ranks(rank_fn, 2):
        # Two stages of two linear layers, two micro-batches each.
        assert calls == {"forward": 8, "backward": 8}
