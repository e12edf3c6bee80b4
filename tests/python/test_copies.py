"""The two copies of each stage hold the same bits, and who has set them apart is told."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from models import squared_error
from outcomes import Outcome, attempt
from torch import Tensor, nn

from dualpipe_ext import DualPipe, Pipeline, _copies
from dualpipe_ext._copies import digest
from dualpipe_ext.checkpoint import latest_checkpoint, save_checkpoint
from dualpipe_ext.testing import run_ranks

WIDTH = 6


def make() -> DualPipe:
    stages = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in "01"]
    return DualPipe(stages)


def test_copies_that_are_trained_stay_equal() -> None:
    def train(rank: int, num_ranks: int) -> None:
        pipeline = make()
        optimizer = torch.optim.AdamW(pipeline.parameters(), lr=0.1)
        inputs = [torch.randn(16, WIDTH)] if rank in (0, 3) else []
        for _ in range(3):
            optimizer.zero_grad()
            pipeline.step(
                *inputs,
                num_chunks=8,
                criterion=squared_error,
                labels=tuple(inputs),
                sync_gradients=True,
            )
            pipeline.clip_grad_norm_(0.1)
            optimizer.step()
        pipeline.check_copies()

    run_ranks(train, 4)


@pytest.mark.parametrize("culprit", range(4))
def test_a_copy_that_one_rank_has_changed(culprit: int) -> None:
    """All ranks are told which, and may make them equal again."""

    def change(rank: int, num_ranks: int) -> Outcome:
        pipeline = make()
        if rank == culprit:
            with torch.no_grad():
                bias = pipeline.module[1].get_parameter("1.bias")
                bias[2] = -bias[2]
        outcome = attempt(pipeline.check_copies)
        pipeline.sync_parameters()
        pipeline.check_copies()
        return outcome

    stage = 3 - culprit  # the second of the rank's
    one, other = sorted((culprit, stage))
    for outcome in run_ranks(change, 4):
        assert outcome.error == "ValueError"
        assert f"stage {stage}, on ranks {one} and {other}, differ in 1 of 4 parame" in outcome.text
        assert "the first of them 1.bias;" in outcome.text
        assert f"sync_parameters(), which keeps those of rank {stage}" in outcome.text


def test_stages_with_one_copy_have_nothing_to_compare() -> None:
    def check(rank: int, num_ranks: int) -> None:
        Pipeline([nn.Linear(rank + 1, rank + 1)], "1f1b").check_copies()

    run_ranks(check, 2)


@pytest.mark.parametrize("differ", [False, True])
def test_saving_warns_of_copies_that_differ(differ: bool, tmp_path: Path) -> None:
    """Once, on the first rank; what is saved is what the documentation says."""

    def save(rank: int, num_ranks: int) -> None:
        torch.manual_seed(0)
        pipeline = make()
        if differ and rank == 1:
            with torch.no_grad():
                for parameter in pipeline.parameters():
                    parameter.zero_()
        save_checkpoint(tmp_path, pipeline, step=1)
        with torch.no_grad():
            for parameter in pipeline.parameters():
                parameter.fill_(2.0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_ranks(save, 2)
    told = [str(warning.message) for warning in caught if "copies" in str(warning.message)]
    assert len(told) == differ
    for text in told:
        assert (
            "those on the ranks of the stages' own numbers are saved: the two copies of stage 0,"
            in text
        )


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_parameter_that_one_copy_alone_has(culprit: int, tmp_path: Path) -> None:
    def add(rank: int, num_ranks: int) -> Outcome:
        pipeline = make()
        if rank == culprit:
            pipeline.module[0].register_parameter("extra", nn.Parameter(torch.ones(2)))
        save_checkpoint(tmp_path, pipeline, step=1)
        return attempt(pipeline.check_copies)

    with pytest.warns(UserWarning, match="differ in 1 of 5"):
        outcomes = run_ranks(add, 2)
    for outcome in outcomes:
        assert outcome.error == "ValueError"
        assert "differ in 1 of 5 parameters, the first of them extra" in outcome.text


def test_what_cannot_be_compared_can_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> str:
        raise RuntimeError("out of memory")

    def save(rank: int, num_ranks: int) -> Path:
        return save_checkpoint(tmp_path, make(), step=1)

    monkeypatch.setattr(_copies, "digest", fail)
    with pytest.warns(UserWarning, match="not found equal; .* are saved: out of memory"):
        (place, other) = run_ranks(save, 2)
    assert place == other == latest_checkpoint(tmp_path)


def test_the_order_of_parameters_does_not_count() -> None:
    def reorder(rank: int, num_ranks: int) -> None:
        pipeline = make()
        for module in pipeline.module[1].children() if rank == 1 else ():
            module.register_parameter("weight", module._parameters.pop("weight"))
        pipeline.check_copies()

    run_ranks(reorder, 2)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.complex64]
)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    """Each flipped by itself; 9 elements are no whole number of words."""
    values = torch.arange(1, 10).to(dtype)
    octets = values.view(torch.uint8)
    found = {digest([values])}
    for place in range(len(octets)):
        for bit in range(8):
            octets[place] ^= 1 << bit
            found.add(digest([values]))
            octets[place] ^= 1 << bit
    assert len(found) == 1 + 8 * len(octets)


def test_every_place_counts() -> None:
    """Values that were swapped, within a piece and between pieces; signs; lengths."""
    values = torch.linspace(-1.0, 1.0, 5)
    found = {digest([values[torch.tensor(order)]]) for order in ([0, 1, 2, 3, 4], [1, 0, 2, 3, 4])}
    found |= {digest([values[torch.tensor(order)]]) for order in ([4, 1, 2, 3, 0], [0, 1, 4, 3, 2])}
    assert len(found) == 4
    long = torch.randn(3 << 17, dtype=torch.float64)
    assert digest([long]) != digest([long.roll(1 << 17)])
    assert digest([long]) != digest([-long])
    assert len({digest([torch.zeros(length)]) for length in range(4)}) == 4
    assert digest([values[:2], values[2:]]) != digest([values[2:], values[:2]])


def test_every_swap_counts() -> None:
    """With weights that are multiples of one number, one of these swaps looks like none."""
    values = torch.randn(120, generator=torch.Generator().manual_seed(23)).to(torch.bfloat16)
    for i in range(120):
        for j in (other for other in range(i) if values[other] != values[i]):
            swapped = values.clone()
            swapped[i], swapped[j] = values[j], values[i]
            assert digest([swapped]) != digest([values]), (i, j)


def test_only_values_count() -> None:
    """Neither strides nor where they begin in memory."""

    def same(one: Tensor, other: Tensor) -> bool:
        return torch.equal(one, other) and digest([one]) == digest([other])

    complex_values = torch.randn(3, dtype=torch.complex64)
    assert same(complex_values.conj(), complex_values.conj().resolve_conj())
    sparse = torch.eye(3).to_sparse()
    assert digest([sparse]) == digest([sparse.clone()]) != digest([7 * sparse])
    square = torch.randn(5, 5)
    assert same(square.t(), square.t().contiguous())
    assert same(square[:, 1], square[:, 1].clone())
    assert same(square.flatten()[1:], square.flatten()[1:].clone())
    assert same(
        square.to(torch.int8).flatten()[3:11], square.to(torch.int8).flatten()[3:11].clone()
    )
