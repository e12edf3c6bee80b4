"""Corners of a step: what goes wrong around it, and what the user changes between two of them."""

from __future__ import annotations

import copy
import math
import pickle
import re
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import squared_error
from outcomes import outcomes
from torch import Tensor, nn

from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline, PipelineError, microbatch_seed
from dualpipe_ext._random import seed_generators
from dualpipe_ext.testing import run_ranks


def batch(rank: int, num_ranks: int, rows: int = 8) -> dict[str, Any]:
    """What step() is given by keyword and, under "x", by position, on one rank of DualPipe."""
    at_end = rank in (0, num_ranks - 1)
    return {"x": torch.ones(rows, 4) if at_end else None, "y": torch.zeros(rows, 4)}


def run_step(model: Pipeline, rank: int, num_ranks: int, **keywords: Any) -> Tensor | None:
    given = batch(rank, num_ranks)
    labels = (given["y"] if given["x"] is not None else None,)
    loss, _ = model.step(
        given["x"], num_chunks=2 * num_ranks, criterion=squared_error, labels=labels, **keywords
    )
    return loss


@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), NotImplementedError("odd"), KeyError("odd")]
)
def test_any_error_before_a_step_fails_it_everywhere(error: Exception) -> None:
    def fail() -> None:
        raise error

    def rank_fn(rank: int, num_ranks: int) -> str:
        model = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
        if rank == 0:
            model._make_step = lambda *_: fail()  # type: ignore[method-assign, assignment]
        with pytest.raises((type(error), PipelineError)) as caught:
            run_step(model, rank, num_ranks)
        if rank == 0:
            del model._make_step
        run_step(model, rank, num_ranks)
        return str(caught.value)

    for text in run_ranks(rank_fn, 2, timeout=20):
        assert "odd" in text


def test_a_replaced_parameter_is_still_summed_and_counted() -> None:
    def rank_fn(rank: int, num_ranks: int) -> tuple[list[Tensor], float]:
        model = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        run_step(model, rank, num_ranks)
        model.sync_gradients()
        grads = [p.grad for _, m in sorted(zip(model.stages, model.module, strict=True))
                 for p in m.parameters()]  # fmt: skip
        return [g for g in grads if g is not None], float(model.clip_grad_norm_(1e9))

    (first, norm), (second, _) = run_ranks(rank_fn, 2)
    assert len(first) == 4 and all(map(torch.equal, first, second))
    assert norm == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in first)))


def test_a_norm_that_is_nan_spreads() -> None:
    def rank_fn(rank: int, num_ranks: int) -> bool:
        model = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
        run_step(model, rank, num_ranks, sync_gradients=True)
        for bias in [m.bias for m, s in zip(model.module, model.stages, strict=True) if s == 0]:
            assert isinstance(bias, Tensor) and bias.grad is not None
            bias.grad[0] = math.nan
        model.clip_grad_norm_(1.0)
        return all(bool(p.grad.isnan().all()) for p in model.parameters() if p.grad is not None)

    assert all(run_ranks(rank_fn, 2))


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("bad in backward")


def test_a_value_error_in_backward_is_the_stages_fault() -> None:
    class Stage(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return RaisesInBackward.apply(super().forward(x))  # type: ignore[no-any-return, no-untyped-call]

    def rank_fn(rank: int, num_ranks: int) -> bool:
        modules = [Stage(4, 4), nn.Linear(4, 4)]  # stage 0 raises
        model = DualPipe(modules if rank == 0 else modules[::-1])
        with pytest.raises(PipelineError, match="bad in backward") as caught:
            run_step(model, rank, num_ranks)
        return isinstance(caught.value.__cause__, ValueError)

    assert any(run_ranks(rank_fn, 2))


def test_a_hook_that_changes_the_loss_in_place_does_not_change_what_is_returned() -> None:
    def rank_fn(rank: int, num_ranks: int) -> Any:
        torch.nn.init.ones_(one := nn.Linear(4, 4, bias=False).weight)
        model = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(one[0, 0])
        plain = run_step(model, rank, num_ranks)
        model.register_before_backward_hook(lambda loss, _: loss.mul_(0.5))
        return plain, run_step(model, rank, num_ranks)

    for plain, hooked in run_ranks(rank_fn, 2):
        assert plain is not None and torch.equal(plain, hooked)


def test_a_step_within_a_step_is_refused() -> None:
    def rank_fn(rank: int, num_ranks: int) -> str:
        model = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])

        def again(*_: object) -> None:
            run_step(model, rank, num_ranks)

        handle = model.register_after_forward_hook(again)
        with pytest.raises(PipelineError) as caught:
            run_step(model, rank, num_ranks)
        handle.remove()
        run_step(model, rank, num_ranks)
        return str(caught.value)

    for text in run_ranks(rank_fn, 2, timeout=20):
        assert "step() was called within a step" in text


def test_overlapped_pairs_are_seeded_like_other_forwards() -> None:
    seen: set[int] = set()

    class Stage(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(torch.initial_seed())
            return super().forward(x)

        @classmethod
        def overlapped_forward_backward(
            cls, module0: Any, inputs0: Any, criterion0: Any, labels0: Any,
            module1: Any, loss1: Any, outputs1: Any, grads1: Any,
        ) -> Any:  # fmt: skip
            output = module0(*inputs0)
            loss0 = None if criterion0 is None else criterion0(output, *labels0)
            torch.autograd.backward([loss1] if loss1 is not None else outputs1,
                                    None if loss1 is not None else grads1)  # fmt: skip
            return [output], loss0

    def rank_fn(rank: int, num_ranks: int) -> None:
        model = Pipeline([Stage(4, 4), Stage(4, 4)], "dualpipev", config=DualPipeConfig(seed=3))
        model.step(
            torch.ones(8, 4), num_chunks=4, criterion=squared_error, labels=(torch.zeros(8, 4),)
        )

    run_ranks(rank_fn, 1)
    assert seen == {microbatch_seed(3, 1, s, m) for s in (0, 1) for m in range(4)}


def test_a_pipeline_is_neither_copied_nor_pickled() -> None:
    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = Pipeline([nn.Linear(4, 4)], "1f1b")
        for act in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"copy its stages, pipeline\.module, or save"):
                act(pipeline)
        copy.deepcopy(pipeline.module)

    run_ranks(rank_fn, 1)


def test_steps_of_two_threads_exclude_each_other() -> None:
    within, may_end = threading.Event(), threading.Event()

    class Waiting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            within.set()
            assert may_end.wait(20.0)
            return super().forward(x)

    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = Pipeline([Waiting(4, 4)], "1f1b")
        x = torch.ones(8, 4)

        def step() -> None:
            pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(x,))

        other = threading.Thread(target=step)
        other.start()
        assert within.wait(20.0)
        for call in (step, pipeline.synchronize):
            with pytest.raises(ValueError, match="or by another thread"):
                call()
        may_end.set()
        other.join()
        assert pipeline.num_steps == 1
        step()

    run_ranks(rank_fn, 1, timeout=60.0)


def test_a_step_seeds_no_gpu_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    others, own = [torch.Generator().manual_seed(i) for i in range(2)]
    monkeypatch.setattr(torch.cuda, "default_generators", (others, own))
    seed_generators(torch.device("cuda", 1), 5)
    assert torch.initial_seed() == own.initial_seed() == 5
    assert others.initial_seed() == 0


def test_outputs_that_do_not_fit_together_come_in_pieces() -> None:
    class Growing(nn.Module):
        """Returns one more column at each call, a number, and every other time a None."""

        calls = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            self.calls += 1
            return x.new_zeros(2, self.calls), x.sum(), x if self.calls % 2 else None

    def rank_fn(rank: int, num_ranks: int) -> Any:
        with torch.no_grad():
            _, outputs = Pipeline([Growing()], "1f1b").step(
                torch.ones(8, 4), num_chunks=4, return_outputs=True
            )
        return outputs

    columns, numbers, sometimes = run_ranks(rank_fn, 1)[0]
    assert [piece.shape for piece in columns] == [(2, 1), (2, 2), (2, 3), (2, 4)]
    assert torch.equal(numbers, torch.full((4,), 8.0))
    assert [piece is None for piece in sometimes] == [False, True, False, True]


def test_all_ranks_synchronize_or_none() -> None:
    """It waits for everybody, disturbs nothing, and tells of a step that failed elsewhere."""

    def rank_fn(rank: int, num_ranks: int) -> str:
        model = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
        run_step(model, rank, num_ranks)
        trace = model.last_trace
        model.synchronize()
        assert model.last_trace == trace
        with pytest.raises((ValueError, PipelineError)) as caught:
            if rank == 1:
                model.step(None, num_chunks=1)
            else:
                model.synchronize()
        model.synchronize()
        run_step(model, rank, num_ranks)
        return str(caught.value)

    for text in run_ranks(rank_fn, 2, timeout=20):
        assert "num_microbatches is 1" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_dim": DualPipeConfig()}, "batch_dim=DualPipeConfig.*by name, config="),
        ({"batch_dim": "0"}, "batch_dim='0': it must be an int"),
        ({"config": {"timeout": 3.0}}, "config={'timeout': 3.0}: .*from_dict"),
    ],
)
def test_arguments_of_the_wrong_type(options: dict[str, Any], text: str) -> None:
    def make(rank: int, size: int) -> None:
        DualPipe([nn.Linear(2, 2), nn.Linear(2, 2)], **options)

    for outcome in outcomes(make, 2):
        assert outcome.is_a("TypeError") and re.search(text, outcome.text), outcome


def test_labels_may_come_from_a_generator() -> None:
    def train(rank: int, size: int) -> float:
        torch.manual_seed(0)
        model = DualPipe([nn.Linear(2, 2), nn.Linear(2, 2)])
        x, y = torch.randn(4, 2), torch.randn(4, 2)
        labels = (label for label in [y])
        loss, _ = model.step(x, num_chunks=4, criterion=F.mse_loss, labels=labels)  # type: ignore[arg-type]
        assert loss is not None
        return float(loss.sum())

    assert all(loss > 0 for loss in run_ranks(train, 2))
