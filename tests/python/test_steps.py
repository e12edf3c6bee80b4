"""One step after another: sizes, modes and pipelines that alternate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import CASES, WIDTH, Microbatch, squared_error
from outcomes import attempt
from parity import (
    Job,
    as_tuple,
    check_equal,
    gradients_of,
    join,
    own_batch,
    own_stages,
    run_unsplit,
)
from torch import Tensor, nn

from dualpipe_ext import DualPipe, DualPipeConfig, DualPipeV, Pipeline
from dualpipe_ext.schedule import plan
from dualpipe_ext.testing import run_ranks


def one_step(pipeline: Pipeline, rank: int, job: Job, microbatches: list[Microbatch]) -> Any:
    """(loss, outputs) of one step of the job on these micro-batches."""
    inputs, labels = own_batch(job.plan(), rank, microbatches)
    return pipeline.step(
        *inputs,
        num_chunks=job.num_chunks,
        criterion=job.what().criterion,
        labels=labels,
        return_outputs=True,
        sync_gradients=job.sync == "within",
    )


def assert_step(job: Job, rank: int, result: Any, microbatches: list[Microbatch]) -> None:
    """Losses and outputs are those of a whole model with fresh parameters."""
    losses, outputs = run_unsplit(job.stages(), microbatches, job.what(), backward=False)
    schedule = job.plan()
    leaving = schedule.microbatches_at(schedule.num_stages - 1, rank)
    if not leaving:
        assert result == (None, None)
        return
    assert torch.equal(result[0], torch.stack([losses[m] for m in leaving]))
    check_equal(as_tuple(result[1]), join(outputs[m] for m in leaving), "outputs")


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "1f1b"])
def test_steps_of_different_sizes_and_shapes(schedule: str) -> None:
    jobs = [Job("attention", schedule, 2, chunks) for chunks in (4, 10, 4, 6)]
    rows = [[2] * 4, [1] * 10, [3] * 4, [2, 1, 1, 2, 1, 1] if schedule == "dualpipe" else [1] * 6]

    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = Pipeline(own_stages(jobs[0], rank), schedule)
        for step, (job, counts) in enumerate(zip(jobs, rows, strict=True)):
            microbatches = job.what().microbatches(counts, seed=step)
            result = one_step(pipeline, rank, job, microbatches)
            assert_step(job, rank, result, microbatches)
            assert pipeline.stats().step_seconds > 0

    run_ranks(rank_fn, 2)


def test_longer_and_shorter_sequences() -> None:
    """Micro-batches of another shape in every step."""
    job = Job("attention", "dualpipe", 2, 4)

    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = Pipeline(own_stages(job, rank), "dualpipe")
        for length in (3, 7, 1, 3):
            generator = torch.Generator().manual_seed(length)
            microbatches = [
                Microbatch(
                    (torch.randn(2, length, WIDTH, generator=generator),),
                    (torch.randn(2, length, WIDTH, generator=generator),),
                )
                for _ in range(4)
            ]
            assert_step(job, rank, one_step(pipeline, rank, job, microbatches), microbatches)

    run_ranks(rank_fn, 2)


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "gpipe", "interleaved_1f1b"])
def test_train_evaluate_train(schedule: str) -> None:
    """Gradients are those of the two training steps; evaluation changes nothing."""
    stages = 2 if schedule == "interleaved_1f1b" else 0
    job = Job("bias", schedule, 4, 8, stages, dtype=torch.float64)

    def rank_fn(rank: int, num_ranks: int) -> dict[int, Any]:
        pipeline = Pipeline(own_stages(job, rank), schedule)
        for step, training in enumerate((True, False, False, True)):
            microbatches = job.what().microbatches([2] * 8, seed=step, dtype=job.dtype)
            before = [gradients_of(m) for m in pipeline.module]
            with torch.set_grad_enabled(training):
                assert_step(job, rank, one_step(pipeline, rank, job, microbatches), microbatches)
            if not training:
                for old, own in zip(before, map(gradients_of, pipeline.module), strict=True):
                    check_equal(tuple(own.values()), tuple(old.values()), "gradients")
        pipeline.sync_gradients()
        return dict(zip(pipeline.stages, map(gradients_of, pipeline.module), strict=True))

    whole = job.stages()
    for step in (0, 3):
        run_unsplit(whole, job.what().microbatches([2] * 8, seed=step, dtype=job.dtype), job.what())
    for gradients in run_ranks(rank_fn, 4):
        for stage, own in gradients.items():
            for name, value in gradients_of(whole[stage]).items():
                torch.testing.assert_close(own[name], value, rtol=1e-11, atol=1e-15)


def test_two_pipelines_in_one_process() -> None:
    """A DualPipe and a V alternate; neither disturbs the other, nor does one's failure."""
    down, vee = Job("bias", "dualpipe", 2, 4), Job("attention", "dualpipev", 2, 5)

    def rank_fn(rank: int, num_ranks: int) -> None:
        first = Pipeline(own_stages(down, rank), "dualpipe")
        second = Pipeline(own_stages(vee, rank), "dualpipev")
        for turn in range(3):
            for job, pipeline in ((down, first), (vee, second)):
                microbatches = job.what().microbatches([2] * job.num_chunks, seed=turn)
                assert_step(job, rank, one_step(pipeline, rank, job, microbatches), microbatches)
            if turn == 0:
                assert attempt(first.step, None, num_chunks=5).is_a("ValueError", "PipelineError")

    run_ranks(rank_fn, 2)


def test_a_pipeline_follows_one_that_is_gone() -> None:
    job = Job("bias", "dualpipe", 2, 4)

    def rank_fn(rank: int, num_ranks: int) -> None:
        for turn in range(3):
            pipeline = Pipeline(own_stages(job, rank), "dualpipe")
            microbatches = job.what().microbatches([2] * 4, seed=turn)
            assert_step(job, rank, one_step(pipeline, rank, job, microbatches), microbatches)
            del pipeline

    run_ranks(rank_fn, 2)


def test_batches_along_another_dimension() -> None:
    case = CASES["bias"]
    schedule = plan("dualpipe", 2, 4)

    class Across(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x.T).T
            return y

    def rank_fn(rank: int, num_ranks: int) -> tuple[Tensor, Tensor]:
        stages = case.stages(2)
        model = DualPipe([Across(stages[s]) for s in schedule.stages_of(rank)], batch_dim=1)
        microbatches = case.microbatches([2] * 4)
        inputs, labels = own_batch(schedule, rank, microbatches)
        assert inputs[0] is not None and labels is not None and labels[0] is not None
        loss, outputs = model.step(
            inputs[0].T,
            num_chunks=4,
            criterion=squared_error,
            labels=(labels[0].T,),
            return_outputs=True,
        )
        assert isinstance(loss, Tensor) and isinstance(outputs, Tensor)
        return loss, outputs

    losses, outputs = run_unsplit(case.stages(2), case.microbatches([2] * 4), case)
    for rank, (loss, own) in enumerate(run_ranks(rank_fn, 2)):
        leaving = schedule.microbatches_at(1, rank)
        torch.testing.assert_close(loss, torch.stack([losses[m] for m in leaving]))
        whole = join(outputs[m] for m in leaving)[0]
        assert whole is not None
        torch.testing.assert_close(own, whole.T)


def test_the_number_of_microbatches_from_the_configuration() -> None:
    job = Job("bias", "dualpipev", 2, 6)

    def rank_fn(rank: int, num_ranks: int) -> None:
        model = DualPipeV(own_stages(job, rank), config=DualPipeConfig(num_microbatches=6))
        microbatches = job.microbatches()
        inputs, labels = own_batch(job.plan(), rank, microbatches)
        result = model.step(
            *inputs, criterion=job.what().criterion, labels=labels, return_outputs=True
        )
        assert_step(job, rank, result, microbatches)

    run_ranks(rank_fn, 2)


def test_a_pipeline_is_not_called() -> None:
    def rank_fn(rank: int, num_ranks: int) -> str:
        return attempt(DualPipe([nn.Identity(), nn.Tanh()]), torch.ones(1)).text

    for text in run_ranks(rank_fn, 2):
        assert "step()" in text and "no_grad" in text


def test_several_inputs_and_labels_with_none_among_them() -> None:
    """Integers, None and another type enter at both ends, and two labels where they leave."""

    class Enter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, WIDTH)

        def forward(self, ids: Tensor, missing: None, weight: Tensor) -> Tensor:
            assert missing is None and ids.dtype == torch.int64 and weight.dtype == torch.float64
            y: Tensor = self.table(ids) * weight.float()[:, None]
            return y

    def criterion(y: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return ((y - target).square().mean(-1) * weight).sum()

    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randint(5, (4,), generator=generator),
            torch.rand(4, dtype=torch.float64, generator=generator),
            torch.randn(4, WIDTH, generator=generator),
            torch.rand(4, generator=generator),
        )
        for _ in range(2)  # those that enter at the first and at the last rank
    ]
    enter, leave = Enter(), nn.Linear(WIDTH, WIDTH)
    made = [[copy.deepcopy(m) for m in pair] for pair in ((enter, leave), (leave, enter))]

    def rank_fn(rank: int, num_ranks: int) -> Tensor:
        pipeline = DualPipe(made[rank])
        ids, weight, _, _ = batches[rank]
        _, _, target, scale = batches[1 - rank]
        loss, _ = pipeline.step(
            ids, None, weight, num_chunks=4, criterion=criterion, labels=(target, scale)
        )
        pipeline.sync_gradients()
        assert loss is not None
        return loss

    losses = []
    for ids, weight, target, scale in batches:
        for half in (slice(0, 2), slice(2, 4)):
            output = leave(enter(ids[half], None, weight[half]))
            losses.append(criterion(output, target[half], scale[half]))
    torch.stack(losses).sum().backward()
    down, up = torch.stack(losses).detach().chunk(2)
    results = run_ranks(rank_fn, 2)
    assert torch.equal(results[1], down) and torch.equal(results[0], up)
    assert enter.table.weight.grad is not None
    for rank, pair in enumerate(made):
        (grad,) = gradients_of(pair[rank]).values()
        torch.testing.assert_close(grad, enter.table.weight.grad)


def test_step_may_be_called_with_inputs_that_need_gradients() -> None:
    """As in a model whose embedding lies outside of the pipeline: the caller's tensor is a leaf."""
    job = Job("bias", "dualpipev", 2, 4, dtype=torch.float64)
    microbatches = job.microbatches()

    def rank_fn(rank: int, num_ranks: int) -> Tensor | None:
        pipeline = Pipeline(own_stages(job, rank), "dualpipev")
        inputs, labels = own_batch(job.plan(), rank, microbatches)
        (x,) = inputs
        if x is not None:
            x.requires_grad_()
        pipeline.step(x, num_chunks=4, criterion=squared_error, labels=labels)
        return None if x is None else x.grad

    grad = run_ranks(rank_fn, 2)[0]
    whole = job.stages()
    expected = []
    for microbatch in microbatches:
        (x,) = microbatch.inputs
        assert x is not None
        values = x.clone().requires_grad_()
        y = values
        for stage in whole:
            y = stage(y)
        squared_error(y, microbatch.labels[0]).backward()  # type: ignore[arg-type]
        assert values.grad is not None
        expected.append(values.grad)
    assert grad is not None
    torch.testing.assert_close(grad, torch.cat(expected), rtol=1e-12, atol=1e-16)


def test_a_stage_may_change_a_mask_that_another_one_of_its_rank_saved() -> None:
    """In the turn of the V both stages are on one rank, as far apart as on two."""

    class Mask(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mask = (x > 0).to(x.dtype)
            return x * mask, mask

    class Flip(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask.sub_(1)

    class Scaled(nn.Module):
        def __init__(self, stage: nn.Module) -> None:
            super().__init__()
            self.stage = stage
            self.scale = nn.Parameter(torch.full((1,), 2.0))

        def forward(self, x: Tensor, *rest: Tensor) -> Any:
            return self.stage(x * self.scale, *rest)

    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))

    def rank_fn(rank: int, num_ranks: int) -> list[Tensor | None]:
        stages = [Scaled(Mask()), Scaled(Flip())]
        pipeline = Pipeline(stages, "dualpipev")
        pipeline.step(
            x.clone(), num_chunks=2, criterion=squared_error, labels=(torch.ones(4, WIDTH),)
        )
        return [stage.scale.grad for stage in stages]

    whole = [Scaled(Mask()), Scaled(Flip())]
    for part in x.chunk(2):
        y, mask = whole[0](part)
        squared_error(whole[1](y, mask.clone()), torch.ones(2, WIDTH)).backward()
    (found,) = run_ranks(rank_fn, 1)
    for grad, stage in zip(found, whole, strict=True):
        assert grad is not None and stage.scale.grad is not None
        torch.testing.assert_close(grad, stage.scale.grad)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_conjugated_and_negated_views_travel_as_what_they_are(num_ranks: int) -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = torch.complex(x, x + 1)
            assert z.conj().is_conj() and z.conj().imag.is_neg()
            return z.conj(), z.conj().imag

    class Sum(nn.Module):
        def forward(self, conjugate: Tensor, negated: Tensor) -> Tensor:
            return conjugate.real + 10 * conjugate.imag + 100 * negated

    x = torch.randn(2, WIDTH)

    def rank_fn(rank: int, num_ranks: int) -> Any:
        stages: list[nn.Module] = [Views(), Sum()]
        kind = "dualpipev" if num_ranks == 1 else "1f1b"
        pipeline = Pipeline(stages if num_ranks == 1 else stages[rank : rank + 1], kind)
        with torch.no_grad():
            inputs = (x,) if rank == 0 else ()
            return pipeline.step(*inputs, num_chunks=2, return_outputs=True)[1]

    torch.testing.assert_close(run_ranks(rank_fn, num_ranks)[-1], x + 110 * (-x - 1))
