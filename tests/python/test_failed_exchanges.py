"""What ranks do together outside of steps and one of them cannot do: all are told at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from models import squared_error
from outcomes import Outcome, attempt
from test_training_mistakes import LABELS, TEXT
from test_training_mistakes import make as make_training
from torch import nn

from dualpipe_ext import _C, DualPipe, DualPipeConfig, PipelineError
from dualpipe_ext.groups import resolve_group
from dualpipe_ext.testing import run_ranks

pytestmark = pytest.mark.measures  # failures are told within seconds

CONFIG = DualPipeConfig(timeout=30.0)
CULPRIT = 1


def make() -> DualPipe:
    return DualPipe([nn.BatchNorm1d(3).eval() for _ in range(2)], config=CONFIG)


def give_up(*_: object, **__: object) -> NoReturn:
    raise OSError("no memory is left")


def check_told(outcomes: list[Outcome], start: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.seconds < 10.0
        if rank == CULPRIT:
            assert outcome.error == "OSError", outcome.text
        else:
            assert outcome.error == "PipelineError", outcome.text
            assert outcome.text.startswith(start), outcome.text
            assert "OSError: no memory is left" in outcome.text


CALLS: dict[str, Callable[[DualPipe], Any]] = {
    "sync_gradients": lambda pipeline: pipeline.sync_gradients(),
    "sync_parameters": lambda pipeline: pipeline.sync_parameters(),
    "sync_buffers": lambda pipeline: pipeline.sync_buffers(),
    "swap_with_mirror": lambda pipeline: pipeline.swap_with_mirror(
        [torch.ones(2)], [torch.ones(2)]
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_exchanges_that_one_rank_cannot_prepare(name: str) -> None:
    def rank_fn(rank: int, num_ranks: int) -> Outcome:
        pipeline = make()
        mirrors: Any = pipeline._local.mirrors
        if rank == CULPRIT:
            mirrors._exchange = give_up
        failed = attempt(CALLS[name], pipeline)
        vars(mirrors).pop("_exchange", None)
        CALLS[name](pipeline)
        return failed

    check_told(run_ranks(rank_fn, 4, timeout=60.0), "rank 1, before step 1: ")


def test_warnings_that_are_errors_on_one_rank() -> None:
    """As they are on the ranks whose stages are not frozen, under ``-W error``."""

    def rank_fn(rank: int, num_ranks: int) -> list[Outcome]:
        pipeline = make()
        x = torch.randn(8, 3)
        pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(x,))
        unsummed: Any = pipeline._unsummed
        unsummed.warn_if_clipped = unsummed.warn_if_summed = (
            give_up if rank == CULPRIT else lambda _: None
        )
        return [attempt(pipeline.clip_grad_norm_, 1.0), attempt(pipeline.sync_gradients)]

    clipped, summed = zip(*run_ranks(rank_fn, 2, timeout=60.0), strict=True)
    check_told(list(clipped), "rank 1 has no norm of its gradients: ")
    check_told(list(summed), "rank 1, after step 1: ")


def test_an_engine_that_one_rank_cannot_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks raise, and make the next one together."""
    make_engine = _C.Engine.loopback
    is_broken = True

    def rank_fn(rank: int, num_ranks: int) -> Outcome:
        nonlocal is_broken
        failed = attempt(make)
        resolve_group(None, None).all_gather("all have failed", 30.0)
        is_broken = False
        make().sync_parameters()
        return failed

    def make_or_not(hub: _C.LoopbackHub, rank: int, timeout: float) -> _C.Engine:
        return give_up() if is_broken and rank == CULPRIT else make_engine(hub, rank, timeout)

    monkeypatch.setattr(_C.Engine, "loopback", make_or_not)
    check_told(run_ranks(rank_fn, 4, timeout=60.0), "rank 1 could not make its pipeline: ")


def test_an_update_that_was_torn_on_one_rank_is_not_saved(tmp_path: Path) -> None:
    """As it is if Ctrl-C came in the middle of it."""

    def rank_fn(rank: int, num_ranks: int) -> Outcome:
        training = make_training(config=CONFIG)
        training.train_step((TEXT, LABELS))
        training._is_torn = rank == CULPRIT
        return attempt(training.save_checkpoint, tmp_path)

    for rank, outcome in enumerate(run_ranks(rank_fn, 4, timeout=60.0)):
        assert outcome.seconds < 10.0
        assert outcome.error == ("ValueError" if rank == CULPRIT else "PipelineError")
        assert "load_checkpoint() first" in outcome.text
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_a_loader_is_told(tmp_path: Path) -> None:
    def loader(rank: int) -> Iterator[Any]:
        yield TEXT, LABELS
        if rank == CULPRIT:
            raise KeyboardInterrupt
        yield TEXT, LABELS

    def rank_fn(rank: int, num_ranks: int) -> Outcome:
        training = make_training(config=CONFIG)
        try:
            training.evaluate(loader(rank))
        except KeyboardInterrupt:
            return Outcome(error="KeyboardInterrupt")
        except PipelineError as error:
            return Outcome(error="PipelineError", text=str(error))
        return Outcome()

    start = time.monotonic()
    own, other = (run_ranks(rank_fn, 2, timeout=60.0)[rank] for rank in (CULPRIT, 1 - CULPRIT))
    assert own.error == "KeyboardInterrupt"
    assert other.error == "PipelineError" and "KeyboardInterrupt()" in other.text, other
    assert time.monotonic() - start < 15.0


def test_a_checkpoint_on_one_rank_alone_is_told_at_once(tmp_path: Path) -> None:
    """As by ``if rank == 0: save_checkpoint()``."""

    def rank_fn(rank: int, num_ranks: int) -> list[Outcome]:
        training = make_training(config=CONFIG)
        save = partial(training.save_checkpoint, tmp_path)
        load = partial(training.load_checkpoint, tmp_path)
        save()
        step = partial(training.train_step, (TEXT, LABELS))
        return [attempt(act if rank == CULPRIT else step) for act in (save, load)]

    for outcome in (each for own in run_ranks(rank_fn, 2, timeout=60.0) for each in own):
        assert outcome.error == "ValueError" and outcome.seconds < 10.0, outcome
        assert "synchronize(), which saving and loading call" in outcome.text, outcome.text
