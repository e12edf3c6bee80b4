"""The profiler adds up what the engine measures, of every rank in its process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import squared_error
from torch import nn

from dualpipe_ext import DualPipe
from dualpipe_ext.testing import run_ranks
from dualpipe_ext.utils import Profiler, disable_profiling, enable_profiling, get_profiler

STEPS, CHUNKS = 3, 8


@pytest.fixture
def profiler(tmp_path: Path) -> Iterator[Profiler]:
    yield enable_profiling(log_dir=tmp_path / "profiles")
    disable_profiling()


def train(rank: int, size: int) -> float:
    """Some steps and one inference; returns the seconds of the last step of training."""
    pipeline = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
    x = torch.ones(CHUNKS, 4) if rank in (0, size - 1) else None
    labels = None if x is None else (x,)
    for _ in range(STEPS):
        pipeline.step(x, num_chunks=CHUNKS, criterion=squared_error, labels=labels)
        pipeline.zero_grad()
    seconds = pipeline.stats().step_seconds
    with torch.no_grad():
        pipeline.step(x, num_chunks=CHUNKS, return_outputs=True)
    return seconds


def test_adds_up_the_steps_of_every_rank(profiler: Profiler) -> None:
    seconds = run_ranks(train, 4)
    found = {(one["rank"], one["kind"]): one for one in profiler.summary()}
    assert len(found) == 8
    for rank in range(4):
        one = found[rank, "training"]
        assert one["steps"] == STEPS and one["last_step_seconds"][-1] == seconds[rank]
        assert one["mean_step_seconds"] == pytest.approx(sum(one["last_step_seconds"]) / STEPS)
        computed = sum(time["seconds"] for time in one["actions"].values()) / STEPS
        assert computed == pytest.approx(one["mean_computing_seconds"], rel=1e-6)
        assert one["measured_bubble"] == pytest.approx(1 - computed / one["mean_step_seconds"])
        counts = {kind: time["count"] / STEPS for kind, time in one["actions"].items()}
        assert sum(n for kind, n in counts.items() if "F" in kind) == CHUNKS
        assert counts["W"] > 0 and counts["F"] > 0
        forwards = found[rank, "inference"]["actions"]
        assert {kind: time["count"] for kind, time in forwards.items()} == {"F": CHUNKS}


def test_prints_and_saves_what_it_found(
    profiler: Profiler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(train, 2)
    profiler.print_summary()
    lines = [line for line in capsys.readouterr().out.splitlines() if "training" in line]
    assert len(lines) == 2 and all(" F 0." in line and " W 0." in line for line in lines)
    path = get_profiler().save_to_file("dualpipe_profile.json")
    assert path == tmp_path / "profiles" / "dualpipe_profile.json"
    saved = json.loads(path.read_text())
    assert all(each["clock"] == "host" for each in saved["ranks"])
    assert saved["ranks"] == profiler.summary()


def test_says_how_to_enable_it(profiler: Profiler) -> None:
    with pytest.raises(ValueError, match="has seen no step: call enable_profiling"):
        profiler.print_summary()
    disable_profiling()
    with pytest.raises(ValueError, match="call enable_profiling"):
        get_profiler()
    run_ranks(train, 2)
    with pytest.raises(ValueError, match="has seen no step"):
        profiler.summary()
