"""Warnings of gradients that are not summed over the copies of a stage, or more than once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from models import WIDTH, squared_error
from torch import nn

from dualpipe_ext import DualPipe
from dualpipe_ext.testing import run_ranks


def train_with(rank: int, num_ranks: int, sums: str, num_steps: int = 3) -> None:
    """Steps with an optimizer between them; ``sums``: never, after, within, at the end, own."""
    pipeline = DualPipe([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
    optimizer = torch.optim.AdamW(pipeline.parameters())
    x = torch.ones(4, WIDTH)
    for _ in range(num_steps):
        pipeline.step(
            x, num_chunks=4, criterion=squared_error, labels=(x,), sync_gradients=sums == "within"
        )
        if sums == "after":
            pipeline.sync_gradients()
        if sums == "own":
            pipeline.mark_gradients_summed()
        if sums != "at the end":
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    if sums in ("at the end", "never"):
        pipeline.sync_gradients()
        optimizer.step()
    with torch.no_grad():
        pipeline.step(x, num_chunks=4)


def test_a_missing_sum_is_warned_of_once() -> None:
    with pytest.warns(UserWarning, match=r"call sync_gradients\(\)") as caught:
        run_ranks(train_with, 2, args=("never",))
    assert sorted(str(warning.message)[:7] for warning in caught) == ["rank 0:", "rank 1:"]
    assert [warning.filename for warning in caught] == [__file__] * 2


def step_and_sum(pipeline: DualPipe, *, within: bool) -> None:
    x = torch.ones(4, WIDTH)
    pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(x,), sync_gradients=within)
    if not within:
        pipeline.sync_gradients()


@pytest.mark.parametrize(
    ("within", "misuse", "warning"),
    [
        (True, DualPipe.sync_gradients, "summed again, which doubles them"),
        (True, partial(step_and_sum, within=True), "counts the earlier steps twice"),
        (True, partial(step_and_sum, within=False), "counts the earlier steps twice"),
        (False, lambda pipeline: pipeline.clip_grad_norm_(1.0), "the norm of one copy's half"),
    ],
)
def test_sums_in_the_wrong_place_are_warned_of(
    within: bool, misuse: Callable[[DualPipe], object], warning: str
) -> None:
    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = DualPipe([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        x = torch.ones(4, WIDTH)
        pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(x,), sync_gradients=within)
        misuse(pipeline)

    with pytest.warns(UserWarning, match=warning) as caught:
        run_ranks(rank_fn, 2)
    assert [warning.filename for warning in caught] == [__file__] * 2


def test_sums_and_norms_of_nothing_are_not_warned_of() -> None:
    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = DualPipe([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        x = torch.ones(4, WIDTH)
        for within in (True, False):
            pipeline.step(
                x, num_chunks=4, criterion=squared_error, labels=(x,), sync_gradients=within
            )
            pipeline.zero_grad()
            assert float(pipeline.clip_grad_norm_(1.0)) == 0.0
            pipeline.sync_gradients()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_ranks(rank_fn, 2)


@pytest.mark.parametrize("sums", ["after", "within", "at the end", "own"])
def test_sums_that_are_made_are_not_missed(sums: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_ranks(train_with, 2, args=(sums,))
