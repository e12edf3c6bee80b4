"""Training over a pipeline gives the numbers of training in one piece."""

from __future__ import annotations

import pytest
import torch
from loops import Loop, check_loop, make_long_gpt

from dualpipe_ext import _memory

LOOPS = {
    "mean": Loop("mean", num_steps=20),
    "sum": Loop("sum", num_steps=20),
    "token": Loop("token", num_steps=20),
    "uneven rows": Loop("mean", rows=(8, 13, 9)),
    "uneven tokens": Loop("token", rows=(8, 13, 9)),
    "clipped": Loop("token", max_grad_norm=0.1),
    "scheduled": Loop("mean", scheduled=True),
    "accumulated": Loop("mean", accumulation_steps=2),
    "accumulated tokens": Loop("token", rows=(8, 11), accumulation_steps=4, max_grad_norm=0.2),
    "accumulated sums": Loop("sum", accumulation_steps=2),
    "scaled": Loop("token", scaled=True, max_grad_norm=0.2),
    "scaled, infinite once": Loop(
        "mean", scaled=True, inf_at=3, scheduled=True, accumulation_steps=2, num_steps=10
    ),
    "nothing saved": Loop("mean", settings={"memory_optimization": "none"}),
    "nothing overlapped": Loop("mean", settings={"overlap_strategy": "none"}),
    "in a V": Loop("token", rows=(17,), schedule="dualpipev", make=make_long_gpt),
    "1f1b": Loop("token", schedule="1f1b", make=make_long_gpt),
}


@pytest.mark.parametrize("name", LOOPS)
def test_trains_as_in_one_piece(name: str) -> None:
    check_loop(LOOPS[name])


def test_offloads_as_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """With host memory under another name, what is saved is copied there and back.

    Memory that is not pinned may be read as soon as a copy returns.
    """
    monkeypatch.setattr(_memory, "HOST", "elsewhere")
    copy_, waits = torch.Tensor.copy_, set()

    def noted(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        waits.add(not non_blocking)
        return copy_(to, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    check_loop(Loop("mean", settings={"memory_optimization": "offload"}))
    assert waits == {True}


def test_trains_on_three_ranks() -> None:
    """Where each stage has a rank of its own."""
    check_loop(Loop("token", schedule="1f1b", make=make_long_gpt), (3,))


def test_trains_in_processes() -> None:
    check_loop(Loop("token", rows=(8, 11), scaled=True, max_grad_norm=0.2), (2,), "processes")
