"""A rank or a link that fails in a step: every rank is told, and the next step works."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from faults import PLACES, TEXT, Trigger, check_failure, fail_at
from mistakes import Call, is_right
from models import squared_error
from outcomes import Outcome, attempt, outcomes
from parity import Job, own_batch, own_stages
from torch import nn

from dualpipe_ext import DualPipe, DualPipeConfig, InternalError, Pipeline, PipelineError
from dualpipe_ext.testing import Fault, MessageKind, run_ranks

pytestmark = pytest.mark.measures

JOB = Job("bias", "dualpipe", 4, 8)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("countdown", [1, 3])
def test_an_error_in_the_users_code(place: str, countdown: int) -> None:
    check_failure(place, outcomes(fail_at, 4, args=(place, countdown)))


@pytest.mark.parametrize(
    "error", [ValueError, TypeError, KeyError, StopIteration, AssertionError, PipelineError]
)
def test_any_kind_of_error(error: type[Exception]) -> None:
    """Whatever a stage raises is a failure of the pipeline, not a mistake in calling it."""
    results = outcomes(fail_at, 4, args=("forward", 2, lambda: error(TEXT)))
    check_failure("forward", results, error.__name__)


def test_an_error_of_torch_has_its_own_words_alone() -> None:
    """The text has no C++ stack frames in it."""

    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = DualPipe([nn.Linear(3, 3), nn.Linear(3, 3)])
        x = torch.ones(2, 4)
        pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(x,))

    for outcome in outcomes(rank_fn, 2):
        assert "shapes cannot be multiplied" in outcome.text
        assert "frame #" not in outcome.text and "Exception raised from" not in outcome.text


def test_an_error_tells_the_users_own_lines() -> None:
    """The innermost first; none of torch's, of this package's, or of the thread's start."""

    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.deep(x)

        def deep(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("lost")

    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = DualPipe([nn.Sequential(Failing()), nn.Sequential(Failing())])
        x = torch.ones(2, 4)
        pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(x,))

    for outcome in outcomes(rank_fn, 2):
        words, _, places = outcome.text.partition("\n\nAt:\n")
        assert words.endswith("KeyError: 'lost'"), outcome.text
        places = places.partition("\n\n")[0].partition("\n(noticed")[0]
        functions = re.findall(r"^  (.*)\(\d+\): (\w+)$", places, re.MULTILINE)
        assert functions == [(__file__, "deep"), (__file__, "forward")], outcome.text


def test_an_error_in_a_backward_of_the_users_own_tells_its_type_and_lines() -> None:
    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise KeyError("lost")

    class Losing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = Lost.apply(super().forward(x))  # type: ignore[no-untyped-call]
            return y

    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = DualPipe([Losing(3, 3), Losing(3, 3)])
        x = torch.ones(4, 3)
        pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(x,))

    found = outcomes(rank_fn, 2)
    for outcome in found:
        assert outcome.error == "PipelineError"
        assert "KeyError: 'lost'" in outcome.text
        assert re.search(rf"  {re.escape(__file__)}\(\d+\): backward\n", outcome.text), outcome.text
    assert "KeyError" in [outcome.cause for outcome in found]


def test_an_error_of_torch_in_backward_has_its_own_words_alone() -> None:
    class InPlace(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x).exp()
            y.detach().add_(1)  # what exp() keeps for its backward is not what it was
            y.add_(1)
            return y

    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = DualPipe([InPlace(3, 3), InPlace(3, 3)])
        x = torch.ones(2, 3)
        pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(x,))

    for outcome in outcomes(rank_fn, 2):
        assert outcome.error == "PipelineError"
        assert "modified by an inplace operation" in outcome.text
        assert "frame #" not in outcome.text and "Exception raised from" not in outcome.text


def test_keyboard_interrupt_passes() -> None:
    def interrupt() -> BaseException:
        return KeyboardInterrupt()

    def only_step(rank: int, num_ranks: int) -> tuple[str, float]:
        pipeline = DualPipe(own_stages(JOB, rank), config=DualPipeConfig(timeout=30.0))
        if rank == 2:
            trigger = Trigger(2, interrupt)
            pipeline.module[0].register_forward_pre_hook(lambda *_: trigger.pull())
        inputs, labels = own_batch(JOB.plan(), rank, JOB.microbatches())
        start = time.monotonic()
        try:
            pipeline.step(*inputs, num_chunks=8, criterion=squared_error, labels=labels)
        except KeyboardInterrupt:
            return "KeyboardInterrupt", time.monotonic() - start
        except PipelineError as error:
            return str(error), time.monotonic() - start
        return "nothing", 0.0

    for rank, (text, seconds) in enumerate(run_ranks(only_step, 4)):
        assert seconds < 5.0
        if rank == 2:
            assert text == "KeyboardInterrupt"
        else:
            assert "rank 2" in text and ": KeyboardInterrupt\n" in text
            assert "EMPTY MESSAGE" not in text


class Losing:
    """Loses the messages it is told to, as long as it is armed."""

    def __init__(self, fault: Fault, kind: MessageKind, stage: int, microbatches: set[int]) -> None:
        self.fault, self.kind, self.stage, self.microbatches = fault, kind, stage, microbatches
        self.armed = True

    def __call__(self, _: int, __: int, kind: MessageKind, stage: int, microbatch: int) -> Fault:
        hit = kind == self.kind and stage == self.stage and microbatch in self.microbatches
        return self.fault if self.armed and hit else Fault.NONE


def step_on_bad_links(
    losing: Losing, timeout: float, sync_gradients: bool = False
) -> list[tuple[Outcome, bool]]:
    """The step with the faults on, and whether the one without them is right; by rank."""

    def rank_fn(rank: int, num_ranks: int) -> tuple[Outcome, bool]:
        config = DualPipeConfig(timeout=timeout, mirror_init="none")
        pipeline = Pipeline(own_stages(JOB, rank), "dualpipe", config=config)
        inputs, labels = own_batch(JOB.plan(), rank, JOB.microbatches())
        keywords: dict[str, Any] = {
            "num_chunks": 8,
            "criterion": squared_error,
            "labels": labels,
            "sync_gradients": sync_gradients,
        }
        outcome = attempt(Call(rank, pipeline, inputs, keywords).run)
        pipeline.group.all_gather("done", 30.0)
        losing.armed = False
        keywords["sync_gradients"] = False
        return outcome, is_right(JOB, rank, Call(rank, pipeline, inputs, keywords))

    found: list[tuple[Outcome, bool]] = run_ranks(rank_fn, 4, faults=losing, timeout=60.0)
    return found


@pytest.mark.parametrize(
    ("kind", "stage", "source", "reader"),
    [(MessageKind.ACTIVATION, 2, 1, 2), (MessageKind.GRADIENT, 0, 1, 0)],
)
def test_a_message_that_never_comes(
    kind: MessageKind, stage: int, source: int, reader: int
) -> None:
    """Micro-batch 3 is the last of its way: nothing comes after it that would tell."""
    name = "activation" if kind == MessageKind.ACTIVATION else "gradient"
    for rank, (outcome, next_is_right) in enumerate(
        step_on_bad_links(Losing(Fault.DROP, kind, stage, {3}), timeout=1.0)
    ):
        assert outcome.error == "PipelineError", f"rank {rank}: {outcome.error}"
        assert 1.0 <= outcome.seconds < 5.0
        assert "longer than 1 s" in outcome.text
        awaited = f"{name} of micro-batch 3 for stage {stage} from rank {source}"
        assert awaited in outcome.text, outcome.text
        for other in range(4):
            assert re.search(rf"\n  rank {other}: step 1\b", outcome.text), outcome.text
        assert re.search(rf"rank {reader}: step 1, action \d+ of \d+: .*{awaited}", outcome.text)
        if rank == reader:
            assert re.search(rf"\nrank {rank} \|.*>\S+<", outcome.text), outcome.text
        assert next_is_right, f"rank {rank}"


def test_a_message_that_is_lost_between_others() -> None:
    losing = Losing(Fault.DROP, MessageKind.ACTIVATION, 2, {1})
    for rank, (outcome, next_is_right) in enumerate(step_on_bad_links(losing, timeout=30.0)):
        assert outcome.error == "PipelineError" and outcome.seconds < 5.0
        assert "rank 1 -> rank 2" in outcome.text
        assert "expected the activation of micro-batch 1 for stage 2" in outcome.text
        assert next_is_right, f"rank {rank}"


def test_a_link_that_breaks() -> None:
    losing = Losing(Fault.FAIL, MessageKind.GRADIENT, 1, {2})
    for rank, (outcome, next_is_right) in enumerate(step_on_bad_links(losing, timeout=30.0)):
        assert outcome.error == "PipelineError" and outcome.seconds < 5.0
        assert "rank 2 -> rank 1" in outcome.text
        assert "gradient of micro-batch 2 for stage 1" in outcome.text
        assert next_is_right, f"rank {rank}"


def test_mirrored_gradients_that_never_come() -> None:
    losing = Losing(Fault.DROP, MessageKind.MIRROR_LOW, 1, {0})
    for rank, (outcome, next_is_right) in enumerate(
        step_on_bad_links(losing, timeout=1.0, sync_gradients=True)
    ):
        assert outcome.error == "PipelineError" and outcome.seconds < 5.0, outcome.seconds
        assert "longer than 1 s" in outcome.text
        assert next_is_right, f"rank {rank}"


def test_a_sum_that_a_rank_stays_away_from() -> None:
    """It is no step: the number in the error is that of the last one."""

    def rank_fn(rank: int, num_ranks: int) -> str:
        config = DualPipeConfig(timeout=3.0)
        pipeline = Pipeline(own_stages(JOB, rank), "dualpipe", config=config)
        inputs, labels = own_batch(JOB.plan(), rank, JOB.microbatches())
        pipeline.step(*inputs, num_chunks=8, criterion=squared_error, labels=labels)
        return "" if rank == 1 else attempt(pipeline.sync_gradients).text

    for rank, text in enumerate(run_ranks(rank_fn, 4)):
        assert rank == 1 or "longer than 3 s: after step 1: " in text, text


def test_a_run_that_is_resumed_goes_on_counting() -> None:
    def rank_fn(rank: int, num_ranks: int) -> str:
        pipeline = Pipeline(own_stages(JOB, rank), "dualpipe")
        pipeline.resume_at(1000)
        if rank == 1:
            pipeline.abandon_step(OSError("no data"))
            assert pipeline.num_steps == 1001
            return ""
        inputs, labels = own_batch(JOB.plan(), rank, JOB.microbatches())
        keywords = {"num_chunks": 8, "criterion": squared_error, "labels": labels}
        return attempt(pipeline.step, *inputs, **keywords).text

    for rank, text in enumerate(run_ranks(rank_fn, 4)):
        assert rank == 1 or text.startswith("rank 1, step 1001: OSError: no data"), text


def test_a_rank_that_does_not_come() -> None:
    """Construction ends, on the ranks that are there, with the name of the one that is not."""

    def rank_fn(rank: int, num_ranks: int) -> str:
        if rank == 1:
            return ""
        modules = [nn.Linear(2, 2), nn.Linear(2, 2)]
        return attempt(DualPipe, modules, config=DualPipeConfig(timeout=0.5)).text

    texts = run_ranks(rank_fn, 4)
    assert texts[1] == ""
    for rank in (0, 2, 3):
        assert re.search(r"rank [023] waited 0.5 s for rank\(s\) 1 of 4", texts[rank])


@pytest.mark.parametrize("timeout", [float("inf"), 1e10])
def test_patience_without_end(timeout: float) -> None:
    """A limit that no clock can count up to is none; 0.3 s is more than the watchdog's period."""

    def rank_fn(rank: int, num_ranks: int) -> None:
        time.sleep(0.3 * rank)
        pipeline = DualPipe(
            [nn.Linear(3, 3), nn.Linear(3, 3)], config=DualPipeConfig(timeout=timeout)
        )
        x = torch.ones(4, 3)
        time.sleep(0.3 * rank)
        pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(x,))

    for outcome in outcomes(rank_fn, 2):
        assert not outcome.error, outcome.text


def test_a_rank_that_stays_away_from_a_step() -> None:
    def rank_fn(rank: int, num_ranks: int) -> Outcome:
        pipeline = DualPipe(own_stages(JOB, rank), config=DualPipeConfig(timeout=1.0))
        inputs, labels = own_batch(JOB.plan(), rank, JOB.microbatches())
        if rank == 2:
            pipeline.group.all_gather("over", 30.0)
            return Outcome()
        keywords = {"num_chunks": 8, "criterion": squared_error, "labels": labels}
        outcome = attempt(Call(rank, pipeline, inputs, keywords).run)
        pipeline.group.all_gather("over", 30.0)
        return outcome

    results = run_ranks(rank_fn, 4, timeout=60.0)
    for rank in (0, 1, 3):
        assert results[rank].error == "PipelineError" and results[rank].seconds < 5.0
        assert "rank 2: unknown (not in a step" in results[rank].text


def test_bugs_of_ours_are_told_apart() -> None:
    assert not issubclass(InternalError, (ValueError, PipelineError))
    assert issubclass(PipelineError, RuntimeError)


def test_failures_again_and_again() -> None:
    """Twenty failures at different places, then a step that is right."""

    def rank_fn(rank: int, num_ranks: int) -> bool:
        pipeline = DualPipe(own_stages(JOB, rank), config=DualPipeConfig(timeout=30.0))
        inputs, labels = own_batch(JOB.plan(), rank, JOB.microbatches())
        keywords = {"num_chunks": 8, "criterion": squared_error, "labels": labels}
        call = Call(rank, pipeline, inputs, keywords)
        for turn in range(20):
            trigger = Trigger(1 + turn % 8, lambda: RuntimeError(TEXT))
            handle = pipeline.module[turn % 2].register_forward_pre_hook(
                lambda *_, trigger=trigger: trigger.pull() if rank == turn % 4 else None  # noqa: B023
            )
            outcome = attempt(call.run)
            handle.remove()
            if outcome.error and outcome.error != "PipelineError":
                raise AssertionError(outcome.text)
            pipeline.zero_grad()
        return is_right(JOB, rank, call)

    assert run_ranks(rank_fn, 4, timeout=60.0) == [True] * 4


def test_a_norm_that_one_rank_cannot_compute() -> None:
    """The reason is told at once, and the next norm works."""

    def rank_fn(rank: int, num_ranks: int) -> tuple[Outcome, float]:
        stage = nn.Embedding(5, 3, sparse=True) if rank == 0 else nn.Linear(3, 3)
        config = DualPipeConfig(timeout=30.0)
        pipeline = Pipeline([stage], "1f1b", config=config)
        pipeline.step(
            torch.arange(4) if rank == 0 else None,
            num_chunks=4,
            criterion=lambda y: y.square().sum(),
            labels=(),
        )
        outcome = attempt(pipeline.clip_grad_norm_, 1.0)
        pipeline.zero_grad()
        return outcome, float(pipeline.clip_grad_norm_(1.0))

    (own, after), (others, other_after) = run_ranks(rank_fn, 2, timeout=60.0)
    assert own.error == "ValueError" and "sparse=False" in own.text
    assert others.error == "PipelineError" and others.seconds < 10.0
    assert "rank 0 has no norm of its gradients: ValueError: a gradient of shape" in others.text
    assert after == other_after == 0.0
