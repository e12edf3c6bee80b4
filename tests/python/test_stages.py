"""Stages that follow the reference's protocol: their own overlap, their own deferred gradients."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from models import WIDTH, Case, regression, squared_error
from outcomes import outcomes
from parity import (
    as_tuple,
    check_equal,
    check_gradients,
    gradients_of,
    join,
    own_batch,
    run_unsplit,
)
from torch import Tensor, nn

from dualpipe_ext import DualPipeConfig, Pipeline, WeightGradStore
from dualpipe_ext.schedule import plan
from dualpipe_ext.testing import run_ranks
from dualpipe_ext.utils import run_backward


class StoredWeight(torch.autograd.Function):
    """A matrix product that leaves its weight gradient to the store when it may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads

        def accumulate() -> None:
            product = grad.flatten(0, -2).T @ x.flatten(0, -2)
            weight.grad = product if weight.grad is None else weight.grad + product

        if WeightGradStore.enabled:
            WeightGradStore.put(accumulate)
        else:
            accumulate()
        return grad @ weight, None


class StoringLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = StoredWeight.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return y


class OverlappingStage(nn.Module):
    """A stage with an overlapped_forward_backward that counts its calls."""

    lock = threading.Lock()
    calls: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.up = StoringLinear(WIDTH, 2 * WIDTH, bias=False)
        self.down = StoringLinear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y

    @classmethod
    def overlapped_forward_backward(
        cls,
        module0: nn.Module,
        inputs0: list[Tensor],
        criterion0: Callable[..., Tensor] | None,
        labels0: list[Tensor] | None,
        module1: nn.Module,
        loss1: Tensor | None,
        outputs1: list[Tensor],
        output_grads1: list[Tensor],
    ) -> tuple[list[Tensor], Tensor | None]:
        with cls.lock:
            cls.calls[cls.__name__] += 1
        assert isinstance(inputs0, list) and isinstance(outputs1, list)
        outputs0 = list(as_tuple(module0(*inputs0)))
        loss0 = None
        if criterion0 is not None:
            assert labels0 is not None
            loss0 = criterion0(*outputs0, *labels0)
        if loss1 is not None:
            loss1.backward()
            loss1.detach_()
        else:
            assert all(o.requires_grad for o in outputs1) and len(outputs1) == len(output_grads1)
            run_backward(outputs1, output_grads1)
        return outputs0, loss0  # type: ignore[return-value]


class OtherStage(OverlappingStage):
    """Another class: not to be mixed with the first one."""


class LikeDDP(nn.Module):
    """Wraps as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


class LikeCompiled(nn.Module):
    """Wraps as torch.compile does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, *inputs: Any) -> Any:
        return self._orig_mod(*inputs)


CASE = Case("overlapping", lambda i, n: OverlappingStage(), regression, squared_error)
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda module: module,
    "DDP": LikeDDP,
    "compiled": LikeCompiled,
    "compiled in DDP": lambda module: LikeDDP(LikeCompiled(module)),
}


def num_pairs(schedule: str, num_ranks: int, num_chunks: int) -> int:
    planned = plan(schedule, num_ranks, num_chunks)
    return sum("OVERLAP" in a for rank in range(num_ranks) for a in planned.actions(rank))


def run_and_check(
    schedule: str,
    num_ranks: int,
    num_chunks: int,
    wrap: Callable[[nn.Module], nn.Module] = WRAPPERS["bare"],
    case: Case = CASE,
    config: DualPipeConfig | None = None,
) -> list[list[str]]:
    """Losses bit-equal and gradients close to the unsplit model; returns the traces."""
    planned = plan(schedule, num_ranks, num_chunks)
    microbatches = case.microbatches([2] * num_chunks)
    whole = case.stages(planned.num_stages)
    losses, outputs = run_unsplit(whole, microbatches, case)
    made = {
        rank: [case.stages(planned.num_stages)[s] for s in planned.stages_of(rank)]
        for rank in range(num_ranks)
    }

    def rank_fn(rank: int, num_ranks: int) -> list[str]:
        stages = made[rank]
        pipeline = Pipeline([wrap(stage) for stage in stages], schedule, config=config)
        inputs, labels = own_batch(planned, rank, microbatches)
        loss, returned = pipeline.step(
            *inputs,
            num_chunks=num_chunks,
            criterion=case.criterion,
            labels=labels,
            return_outputs=True,
        )
        pipeline.sync_gradients()
        leaving = planned.microbatches_at(planned.num_stages - 1, rank)
        if leaving:
            assert loss is not None and torch.equal(loss, torch.stack([losses[m] for m in leaving]))
            check_equal(as_tuple(returned), join(outputs[m] for m in leaving), f"rank {rank}")
        for stage, module in zip(pipeline.stages, stages, strict=True):
            check_gradients(
                gradients_of(module), gradients_of(whole[stage]), torch.float32, f"stage {stage}"
            )
        return [event.action for event in pipeline.last_trace]

    return run_ranks(rank_fn, num_ranks)


@pytest.fixture(autouse=True)
def no_calls_yet() -> None:
    OverlappingStage.calls.clear()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_the_stages_own_overlap_is_called_for_every_pair(schedule: str, wrapper: str) -> None:
    traces = run_and_check(schedule, 4, 10, WRAPPERS[wrapper])
    pairs = num_pairs(schedule, 4, 10)
    assert pairs > 0
    assert OverlappingStage.calls == {"OverlappingStage": pairs}
    assert sum("OVERLAP" in action for trace in traces for action in trace) == pairs


@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(2, 4), (2, 20), (8, 16), (8, 20)])
def test_overlap_at_other_sizes(num_ranks: int, num_chunks: int) -> None:
    run_and_check("dualpipe", num_ranks, num_chunks)
    assert OverlappingStage.calls.total() == num_pairs("dualpipe", num_ranks, num_chunks)


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "gpipe", "zbv"])
def test_schedules_without_pairs_use_the_store_alone(schedule: str) -> None:
    run_and_check(schedule, 4, 8)
    assert not OverlappingStage.calls


def test_overlap_can_be_switched_off() -> None:
    traces = run_and_check("dualpipe", 4, 8, config=DualPipeConfig(use_overlapped=False))
    assert not OverlappingStage.calls
    assert not any("OVERLAP" in action for trace in traces for action in trace)


def test_inference_does_not_overlap() -> None:
    planned = plan("dualpipe", 2, 8)
    microbatches = CASE.microbatches([2] * 8)

    def rank_fn(rank: int, num_ranks: int) -> None:
        stages = CASE.stages(2)
        pipeline = Pipeline([stages[s] for s in planned.stages_of(rank)], "dualpipe")
        inputs, labels = own_batch(planned, rank, microbatches)
        with torch.no_grad():
            pipeline.step(*inputs, num_chunks=8, criterion=squared_error, labels=labels)

    run_ranks(rank_fn, 2)
    assert not OverlappingStage.calls


class TwoTensors(OverlappingStage):
    """Several tensors between stages, one without a gradient and one None."""

    def forward(self, x: Tensor, *rest: Tensor | None) -> Any:
        y = super().forward(x)
        step = rest[0] if rest else torch.zeros(len(x), dtype=torch.int64)
        assert step is not None
        return y, step + 1, None


def first_of_two(y: Tensor, step: Tensor, none: None, target: Tensor) -> Tensor:
    return F.mse_loss(y, target) + step.sum() * 1e-3


def test_overlap_of_stages_with_several_tensors() -> None:
    case = Case("two", lambda i, n: TwoTensors(), regression, first_of_two)
    run_and_check("dualpipe", 4, 8, case=case)
    assert OverlappingStage.calls == {"TwoTensors": num_pairs("dualpipe", 4, 8)}


def test_a_model_that_ends_in_a_loss_of_its_own() -> None:
    """A criterion without labels, whose loss has one element but a dimension."""

    def mean(y: Tensor) -> Tensor:
        return y.square().mean().reshape(1)

    planned = plan("dualpipe", 2, 6)
    microbatches = CASE.microbatches([2] * 6)

    def rank_fn(rank: int, num_ranks: int) -> Tensor | None:
        stages = CASE.stages(2)
        pipeline = Pipeline([stages[s] for s in planned.stages_of(rank)], "dualpipe")
        inputs, _ = own_batch(planned, rank, microbatches)
        return pipeline.step(*inputs, num_chunks=6, criterion=mean, labels=())[0]

    whole = CASE.stages(2)
    for rank, loss in enumerate(run_ranks(rank_fn, 2)):
        expected = [
            mean(whole[1](whole[0](microbatches[m].inputs[0])))
            for m in planned.microbatches_at(1, rank)
        ]
        assert torch.equal(loss, torch.cat(expected))


def test_different_classes_fall_back_and_say_so_once() -> None:
    planned = plan("dualpipe", 2, 8)
    microbatches = CASE.microbatches([2] * 8)

    def rank_fn(rank: int, num_ranks: int) -> None:
        stages = [OverlappingStage(), OtherStage()]
        pipeline = Pipeline([stages[s] for s in planned.stages_of(rank)], "dualpipe")
        inputs, labels = own_batch(planned, rank, microbatches)
        for _ in range(2):
            pipeline.step(*inputs, num_chunks=8, criterion=squared_error, labels=labels)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_ranks(rank_fn, 2)
    texts = sorted(str(w.message) for w in caught)
    assert len(texts) == 2, texts
    for rank, text in enumerate(texts):
        assert f"rank {rank}" in text and "different classes" in text
        assert "OverlappingStage" in text and "OtherStage" in text
        assert "one after the other" in text
    assert not OverlappingStage.calls


def test_ranks_that_differ_in_overlap_are_told() -> None:
    def rank_fn(rank: int, num_ranks: int) -> None:
        stages = CASE.stages(2)
        config = DualPipeConfig(mirror_init="none")
        Pipeline(
            stages if rank == 0 else [nn.Linear(3, 3), nn.Linear(3, 3)], "dualpipe", config=config
        )

    for outcome in outcomes(rank_fn, 2):
        assert outcome.is_a("ValueError") and "overlap" in outcome.text


def test_an_overlap_that_fails_names_its_pair() -> None:
    class Failing(OverlappingStage):
        @classmethod
        def overlapped_forward_backward(cls, *arguments: Any) -> Any:
            raise RuntimeError("the cable is loose")

    planned = plan("dualpipe", 2, 8)
    microbatches = CASE.microbatches([2] * 8)

    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = Pipeline([Failing(), Failing()], "dualpipe")
        inputs, labels = own_batch(planned, rank, microbatches)
        pipeline.step(*inputs, num_chunks=8, criterion=squared_error, labels=labels)

    for outcome in outcomes(rank_fn, 2):
        assert outcome.error == "PipelineError"
        assert "OVERLAP_F_B" in outcome.text and "the cable is loose" in outcome.text


def test_the_store_defers_to_w() -> None:
    """With the native split off, the store of the user's own functions still works."""
    config = DualPipeConfig(split_weight_gradients=False, use_overlapped=False)
    run_and_check("zb1p", 4, 8, config=config)
    run_and_check("dualpipe", 4, 8, config=config)
