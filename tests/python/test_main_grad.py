"""Parameters with a ``main_grad``: all of their gradient is there, whatever computes it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from models import squared_error
from outcomes import attempt
from parity import Job, Sync, own_batch, own_stages, run_unsplit
from torch import Tensor, nn

from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline, TrainingWrapper
from dualpipe_ext.testing import run_ranks


def with_main_grads(stages: list[nn.Module], dtype: torch.dtype) -> list[nn.Module]:
    for parameter in nn.ModuleList(stages).parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=dtype)  # type: ignore[attr-defined]
    return stages


def sum_of(parameter: nn.Parameter) -> Tensor:
    total: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return total


@pytest.mark.parametrize("sync", ["after", "within"])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", ["bias", "attention", "tied"])
def test_sums_and_norms(name: str, hooked: bool, sync: Sync) -> None:
    """Of layers that are deferred and of those that are not, and of one that has a share in both."""
    job = Job(name, "dualpipe", 2, 4, dtype=torch.float64)

    def rank_fn(rank: int, num_ranks: int) -> list[Any]:
        stages = with_main_grads(own_stages(job, rank), torch.float64)
        for parameter in nn.ModuleList(stages).parameters():
            if hooked:
                parameter.register_post_accumulate_grad_hook(lambda p: None)
        pipeline = Pipeline(stages, "dualpipe")
        inputs, labels = own_batch(job.plan(), rank, job.microbatches())
        pipeline.step(
            *inputs,
            num_chunks=4,
            criterion=job.what().criterion,
            labels=labels,
            sync_gradients=sync == "within",
        )
        if sync == "after":
            pipeline.sync_gradients()
        assert all(p.grad is None for p in pipeline.parameters())
        before = [[sum_of(p).clone() for p in m.parameters()] for m in pipeline.module]
        norm = float(pipeline.clip_grad_norm_(1e-3))
        clipped = [[sum_of(p).clone() for p in m.parameters()] for m in pipeline.module]
        return [before, norm, clipped]

    whole = nn.ModuleList(copy.deepcopy(nn.ModuleList(job.stages())))
    run_unsplit(list(whole), job.microbatches(), job.what())
    norm = float(nn.utils.clip_grad_norm_(whole.parameters(), float("inf")))
    close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-15)
    for rank, (before, found_norm, clipped) in enumerate(run_ranks(rank_fn, 2)):
        assert found_norm == pytest.approx(norm, rel=1e-12)
        for place, stage in enumerate(job.plan().stages_of(rank)):
            for value, small, parameter in zip(
                before[place], clipped[place], whole[stage].parameters(), strict=True
            ):
                assert parameter.grad is not None
                close(value, parameter.grad)
                close(small, value * (1e-3 / (norm + 1e-6)))


def test_gradients_of_microbatches_are_not_rounded_to_each_other() -> None:
    """A norm's in bfloat16, which autograd computes: its sum is that of float32."""
    gains = torch.tensor([1.0, 2.0**-9, 2.0**-9, 2.0**-9])  # lost in bfloat16, beside the first

    def criterion(output: Tensor, gain: Tensor) -> Tensor:
        return (output * gain).sum()

    def rank_fn(rank: int, num_ranks: int) -> Tensor:
        stage = nn.LayerNorm(2, dtype=torch.bfloat16)
        pipeline = Pipeline(with_main_grads([stage], torch.float32), "1f1b")
        x = torch.ones(4, 2, dtype=torch.bfloat16)
        labels = (gains.bfloat16()[:, None],)
        pipeline.step(x, num_chunks=4, criterion=criterion, labels=labels)
        return sum_of(stage.bias)

    (total,) = run_ranks(rank_fn, 1)
    assert torch.equal(total, gains.sum().expand(2))


def test_a_grad_in_the_same_memory_counts_once() -> None:
    stages = [nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(2)]

    def rank_fn(rank: int, num_ranks: int, aliased: bool) -> list[Tensor | None]:
        own = copy.deepcopy(nn.ModuleList(stages))
        if aliased:
            for parameter in nn.ModuleList(with_main_grads(list(own), torch.float32)).parameters():
                parameter.grad = sum_of(parameter).view_as(parameter)
        pipeline = DualPipe(list(own))
        x = torch.ones(4, 3)
        pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(2 * x,))
        pipeline.sync_gradients()
        pipeline.clip_grad_norm_(0.1)
        return [p.grad for p in pipeline.parameters()]

    plain = run_ranks(rank_fn, 2, args=(False,))
    for rank, found in enumerate(run_ranks(rank_fn, 2, args=(True,))):
        for grad, expected in zip(found, plain[rank], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8)


def test_a_grad_from_before_is_told() -> None:
    def rank_fn(rank: int, num_ranks: int) -> str:
        pipeline = DualPipe(
            with_main_grads([nn.Linear(2, 2) for _ in range(2)], torch.float32),
            config=DualPipeConfig(timeout=10.0),
        )
        if rank == 1:
            pipeline.module[0].weight.grad = torch.ones(2, 2)
        x = torch.ones(4, 2)
        keywords: dict[str, Any] = {"criterion": squared_error, "labels": (x,)}
        outcome = attempt(pipeline.step, x, num_chunks=4, **keywords)
        return f"{outcome.error}: {outcome.text}"

    first, second = run_ranks(rank_fn, 2)
    told = "weight of stage 1 has both a main_grad"
    assert second.startswith(f"ValueError: {told}") and "set .grad to None" in second
    assert first.startswith("PipelineError") and told in first


class SumDescent(torch.optim.SGD):
    """Reads ``main_grad``, as optimizers of mixed precision do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                total = getattr(parameter, "main_grad", parameter.grad)
                parameter.data.sub_(total, alpha=group["lr"])


def test_training_with_accumulation_and_clipping() -> None:
    """Sums start anew after each update, and count as one batch until then."""

    whole = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)))
    batches = [torch.randn(8, 4) for _ in range(4)]

    def rank_fn(rank: int, num_ranks: int, in_main: bool) -> list[Tensor]:
        model = copy.deepcopy(whole)
        if in_main:
            with_main_grads([model], torch.float32)
        training = TrainingWrapper(
            model,
            DualPipeConfig(num_stages=2, num_microbatches=4),
            lambda parameters: SumDescent(parameters, lr=0.1),
            loss_fn=nn.functional.mse_loss,
            max_grad_norm=0.5,
            accumulation_steps=2,
        )
        for x in batches:
            training.train_step((x, x.sin()))
        return [p.detach().clone() for p in training.pipeline.parameters()]

    plain = run_ranks(rank_fn, 2, args=(False,))
    for rank, parameters in enumerate(run_ranks(rank_fn, 2, args=(True,))):
        for found, expected in zip(parameters, plain[rank], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
