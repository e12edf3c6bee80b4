"""Dropout in a training loop: ranks that were seeded alike do not draw alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dropout_runs import Masks, go_on, train_both

from dualpipe_ext.testing import run_ranks


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, Any]]]:
    return run_ranks(train_both, 4, "processes")


def masks_of(ranks: list[dict[str, Any]]) -> Masks:
    return [mask for rank in ranks for mask in rank["masks"]]


def test_mirrors_draw_for_themselves_and_loaders_alike(found: list[list[dict[str, Any]]]) -> None:
    ranks = [one for one, _ in found]
    masks = masks_of(ranks)
    assert len(set(masks)) == len(masks) == 4 * 4 * 8  # steps, layers, micro-batches
    assert len({rank["drawn"] for rank in ranks}) == len({rank["next"] for rank in ranks}) == 1


def test_replicas_draw_for_themselves(found: list[list[dict[str, Any]]]) -> None:
    masks = masks_of([side_by_side for _, side_by_side in found])
    assert len(set(masks)) == len(masks) == 4 * 4 * 4 * 2  # steps, layers, micro-batches, replicas


def test_a_resumed_run_drops_what_the_uninterrupted_one_does(tmp_path: Path) -> None:
    found = run_ranks(go_on, 4, "processes", (tmp_path,))
    for rank in found:
        assert rank["saved"] and rank["resumed"] == rank["saved"]
    assert len({tuple(rank["saved"]) for rank in found}) == 4
