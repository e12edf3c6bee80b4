"""Mistakes that callers of ``step`` make on some rank, and what they must be told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from models import squared_error
from outcomes import Outcome, attempt
from parity import Job, own_batch, own_stages, unsplit
from torch import Tensor, nn

from dualpipe_ext import DualPipeConfig, Pipeline


@dataclass
class Call:
    """The arguments of step() on one rank, for a mistake to spoil."""

    rank: int
    pipeline: Pipeline
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    grad: bool = True

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def run(self) -> Tensor | None:
        with nullcontext() if self.grad else torch.no_grad():
            loss, _ = self.pipeline.step(*self.inputs, **self.keywords)
        return loss


@dataclass(frozen=True)
class Mistake:
    """``spoil`` changes the arguments. ``culprits``: the ranks that get ``error``; None: all.

    ``mutual``: ranks contradict one another; those that notice it get ``error``.

    ``parts`` must all be found in the message: what was found, what is allowed, what to do.
    """

    spoil: Callable[[Call], None]
    parts: tuple[str, ...]
    culprits: tuple[int, ...] | None = (0,)
    error: str = "ValueError"
    schedule: str = "dualpipe"
    num_ranks: int = 4
    mutual: bool = False
    cause: str = field(default="")


def _set(key: str, value: Any, ranks: Iterable[int] | None = (0,)) -> Callable[[Call], None]:
    def spoil(call: Call) -> None:
        if ranks is None or call.rank in ranks:
            call.keywords[key] = value

    return spoil


def _inputs(change: Callable[[Any], Any], rank: int = 0) -> Callable[[Call], None]:
    def spoil(call: Call) -> None:
        if call.rank == rank:
            call.inputs = (change(call.inputs[0]),)

    return spoil


def _labels(change: Callable[[Any], Any], rank: int = 0) -> Callable[[Call], None]:
    def spoil(call: Call) -> None:
        if call.rank == rank:
            call.keywords["labels"] = change(call.keywords["labels"])

    return spoil


def _criterion(change: Callable[[Tensor], Any], rank: int = 0) -> Callable[[Call], None]:
    return _set("criterion", lambda x, y: change(squared_error(x, y)), (rank,))


def _stage_returns(value: Any) -> Callable[[Call], None]:
    def spoil(call: Call) -> None:
        if call.rank == 1:
            call.pipeline.module[0].register_forward_hook(lambda *_: value)

    return spoil


def _bare_labels(call: Call) -> None:
    if call.is_first:
        call.keywords["labels"] = call.keywords["labels"][0]


def _no_grad(call: Call) -> None:
    call.grad = call.rank != 0


MISTAKES = {
    "labels that are no tuple": Mistake(
        _bare_labels, ("labels must be a tuple", "found a tensor", "labels=(y,)"), error="TypeError"
    ),
    "odd number of micro-batches": Mistake(
        _set("num_chunks", 9, None),
        ("dualpipe", "num_microbatches is 9", "even", "at least 2 * num_ranks = 8", "use 10"),
        None,
    ),
    "too few micro-batches": Mistake(
        _set("num_chunks", 6, None),
        ("dualpipe", "num_microbatches is 6", "at least 2 * num_ranks = 8", "use 8"),
        None,
    ),
    "too few micro-batches for a V": Mistake(
        _set("num_chunks", 3, None),
        ("dualpipev", "num_microbatches is 3", "at least 2 * num_ranks = 8"),
        None,
        schedule="dualpipev",
    ),
    "no number of micro-batches": Mistake(
        _set("num_chunks", 0, None), ("num_chunks", "num_microbatches"), None
    ),
    "a number of micro-batches that is no int": Mistake(
        _set("num_chunks", 8.0, None), ("num_chunks", "8.0", "int"), None, "TypeError"
    ),
    "numbers of micro-batches that differ": Mistake(
        _set("num_chunks", 10, (2,)),
        ("8 micro-batches", "10 micro-batches", "rank 2"),
        None,
        mutual=True,
    ),
    "gradient sums on one rank alone": Mistake(
        _set("sync_gradients", True, (1,)), ("rank 1", "summing gradients"), None, mutual=True
    ),
    "inference on one rank alone": Mistake(
        _no_grad, ("rank 0", "training", "inference"), None, mutual=True
    ),
    "fewer rows than micro-batches": Mistake(
        _inputs(lambda x: x[:3]), ("inputs", "3 rows", "4 micro-batches", "larger batch")
    ),
    "fewer labels than micro-batches": Mistake(
        _labels(lambda y: (y[0][:3],)), ("labels", "3 rows", "4 micro-batches", "larger batch")
    ),
    "inputs of different numbers of rows": Mistake(
        lambda call: _two_inputs(call), ("inputs differ", "rows", "[7, 8]")
    ),
    "no criterion": Mistake(
        _set("criterion", None), ("criterion is missing on rank 0", "4 to 7", "no_grad")
    ),
    "no labels": Mistake(
        _set("labels", None, (3,)), ("labels are missing on rank 3", "0 to 3", "labels="), (3,)
    ),
    "a None among the labels": Mistake(
        _set("labels", (None,), (0,)), ("labels are missing on rank 0", "labels=()")
    ),
    "labels on the wrong rank": Mistake(
        _set("labels", (torch.zeros(8, 8),), (1,)),
        ("labels were given on rank 1", "rank 0 and rank 3"),
        (1,),
    ),
    "labels on the last rank of a V": Mistake(
        _set("labels", (torch.zeros(8, 8),), (3,)),
        ("labels were given on rank 3", "rank 0"),
        (3,),
        schedule="dualpipev",
    ),
    "inputs on the wrong rank": Mistake(
        _inputs(lambda _: torch.zeros(8, 8), 2),
        ("inputs were given on rank 2", "rank 0 and rank 3"),
        (2,),
    ),
    "no inputs": Mistake(
        _inputs(lambda _: None, 3), ("inputs are missing on rank 3", "4 to 7", "step(x"), (3,)
    ),
    "inputs that are no tensors": Mistake(
        _inputs(lambda x: x.tolist()), ("inputs must be tensors", "list"), error="TypeError"
    ),
    "inputs without a batch dimension": Mistake(
        _inputs(lambda _: torch.tensor(1.0)), ("0 dimensions", "batch_dim=0")
    ),
    "a criterion that does not reduce": Mistake(
        _set("criterion", lambda x, y: (x - y).square()),
        ("must return a scalar", "(2, 8)", ".mean()"),
    ),
    "a criterion that returns a float": Mistake(
        _criterion(Tensor.item), ("scalar tensor", "float"), error="TypeError"
    ),
    "a criterion that returns nothing": Mistake(
        _criterion(lambda _: None), ("scalar tensor", "NoneType"), error="TypeError"
    ),
    "a criterion that returns integers": Mistake(
        _criterion(lambda loss: loss.long()), ("without a graph", "detach()")
    ),
    "a criterion that detaches": Mistake(
        _criterion(Tensor.detach, 3), ("without a graph", "detach()"), (3,)
    ),
    "a criterion that is no function": Mistake(
        _set("criterion", 3), ("criterion", "int", "call"), error="TypeError"
    ),
    "a stage that returns text": Mistake(
        _stage_returns("text"), ("stage 1", "str", "a tuple of tensors"), (1,), "TypeError"
    ),
    "a stage that returns a dict": Mistake(
        _stage_returns({"x": 1}), ("stage 1", "dict", "a tuple of tensors"), (1,), "TypeError"
    ),
    "a stage that returns a number in a tuple": Mistake(
        _stage_returns((torch.ones(2), 3)),
        ("stage 1", "int", "tensors and None"),
        (1,),
        "TypeError",
    ),
    "a stage that returns a sparse tensor": Mistake(
        _stage_returns(torch.eye(3).to_sparse()), ("Sparse", "to_dense()"), (1,)
    ),
    "a shape that the first stage cannot take": Mistake(
        _inputs(lambda x: F.pad(x, (0, 1))),
        ("rank 0", "0F0", "cannot be multiplied"),
        error="PipelineError",
        cause="RuntimeError",
    ),
    "a shape that another rank cannot take": Mistake(
        _stage_returns(torch.ones(2, 5)),
        ("rank 2", "2F0", "cannot be multiplied"),
        (2,),
        error="PipelineError",
        cause="RuntimeError",
    ),
    "a type that another rank cannot take": Mistake(
        _stage_returns(torch.ones(2, 8, dtype=torch.int64)),
        ("rank 2", "2F0"),
        (2,),
        error="PipelineError",
        cause="RuntimeError",
    ),
}


def _two_inputs(call: Call) -> None:
    if call.is_first:
        call.inputs = (call.inputs[0], call.inputs[0][:7])


def make_mistake(rank: int, num_ranks: int, name: str) -> tuple[Outcome, bool]:
    """(how the spoiled step went, whether the next step was right) on one rank."""
    mistake = MISTAKES[name]
    job = Job("bias", mistake.schedule, num_ranks, 8)
    pipeline = Pipeline(own_stages(job, rank), job.schedule, config=DualPipeConfig(timeout=30.0))

    def good_call() -> Call:
        inputs, labels = own_batch(job.plan(), rank, job.microbatches())
        keywords = {"num_chunks": 8, "criterion": squared_error, "labels": labels}
        return Call(rank, pipeline, inputs, keywords)

    spoiled = good_call()
    mistake.spoil(spoiled)
    outcome = attempt(spoiled.run)
    for module in pipeline.module:
        module._forward_hooks.clear()
    return outcome, is_right(job, rank, good_call())


def is_right(job: Job, rank: int, call: Call) -> bool:
    """Runs a step that is as it should be, and compares losses and gradients."""
    call.pipeline.zero_grad()
    loss = call.run()
    call.pipeline.sync_gradients()
    expected = unsplit(job)
    plan = job.plan()
    leaving = plan.microbatches_at(plan.num_stages - 1, rank)
    if leaving and not torch.equal(loss, torch.stack([expected.losses[m] for m in leaving])):  # type: ignore[arg-type]
        return False
    return all(
        _close(module, expected.gradients[stage])
        for stage, module in zip(call.pipeline.stages, call.pipeline.module, strict=True)
    )


def _close(module: nn.Module, gradients: dict[str, Tensor | None]) -> bool:
    return all(
        p.grad is not None and torch.allclose(p.grad, gradients[name], rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]
        for name, p in module.named_parameters()
    )


def check_mistake(name: str, results: list[Outcome]) -> None:
    """Every rank was told, within seconds, and was right in the next step."""
    mistake = MISTAKES[name]
    culprits = range(len(results)) if mistake.culprits is None else mistake.culprits
    for rank, result in enumerate(results):
        assert not result.error, f"rank {rank}: {result.error}: {result.text}"
        outcome, next_is_right = result.value
        assert outcome.error, f"rank {rank} did not raise"
        assert outcome.seconds < 5.0, f"rank {rank} took {outcome.seconds} s"
        if mistake.mutual:
            assert outcome.is_a(mistake.error, "PipelineError"), f"rank {rank}: {outcome.error}"
        elif rank in culprits:
            assert outcome.is_a(mistake.error), f"rank {rank}: {outcome.error}: {outcome.text}"
            assert outcome.cause == mistake.cause, f"rank {rank}: {outcome.cause}"
        else:
            assert outcome.error == "PipelineError", f"rank {rank}: {outcome.error}"
            assert f"rank {culprits[0]}" in outcome.text
        for part in mistake.parts:
            assert part in outcome.text, f"rank {rank}: no {part!r} in: {outcome.text}"
        assert next_is_right, f"rank {rank}: the step after the mistake is wrong"
    assert any(result.value[0].is_a(mistake.error) for result in results)
