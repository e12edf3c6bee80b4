"""The same promises where ranks are processes over gloo. One start of the ranks, many checks."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from faults import check_failure
from mistakes import check_mistake
from parity import Job, check_results, unsplit
from ports import free_port
from process_ranks import (
    JOBS,
    MISTAKES,
    PLACES,
    clip_late,
    die_in_a_step,
    everything,
    gather_from_the_dead,
    lose_the_store,
    over_groups_made_again,
    stop_the_store,
)

from dualpipe_ext.testing import run_ranks

pytestmark = pytest.mark.measures  # failures are told within seconds


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What four processes came to, by rank."""
    return run_ranks(everything, 4, "processes", timeout=150.0)


@pytest.mark.parametrize("name", JOBS)
def test_parity(found: list[dict[str, Any]], name: str) -> None:
    check_results(JOBS[name], [result[name] for result in found], unsplit(JOBS[name]))


def test_dropout_does_drop() -> None:
    """Or the parity of the dropout cases would say nothing."""
    job = JOBS["dropout"]
    losses = unsplit(job).losses
    other = unsplit(dataclasses.replace(job, config={"seed": 8})).losses
    assert not any(torch.equal(a, b) for a, b in zip(losses, other, strict=True))


def test_a_seed_of_steps_leaves_the_callers_random_numbers(found: list[dict[str, Any]]) -> None:
    torch.manual_seed(3)
    expected = [torch.rand(2), torch.rand(2)]
    for result in found:
        for drawn, value in zip(result["random numbers"], expected, strict=True):
            assert torch.equal(drawn, value)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(found: list[dict[str, Any]], name: str) -> None:
    check_mistake(name, [result[name] for result in found])


@pytest.mark.parametrize("place", PLACES)
def test_failures(found: list[dict[str, Any]], place: str) -> None:
    check_failure(place, [result[f"fails in {place}"] for result in found])


def test_unequal_modules(found: list[dict[str, Any]]) -> None:
    for result in found:
        outcome = result["unequal modules"]
        assert outcome.is_a("ValueError") and "differs between its copies" in outcome.text


def test_mapped_ranks(found: list[dict[str, Any]]) -> None:
    losses = unsplit(Job("bias", "dualpipev", 4, 8)).losses
    for rank, result in enumerate(found):
        place, loss = result["mapped"]
        assert place == 3 - rank
        assert (loss is None) == (place != 0)
        assert loss is None or torch.equal(loss, torch.stack(losses))


def test_a_group_of_gpus_alone(found: list[dict[str, Any]]) -> None:
    """As torch.distributed.init_process_group("nccl") makes one."""
    expected = torch.stack(unsplit(Job("bias", "dualpipev", 4, 8)).losses)
    for rank, result in enumerate(each["group of GPUs"] for each in found):
        for loss in result["losses"]:
            assert (loss is None) == (rank != 0)
            assert loss is None or torch.equal(loss, expected)
        assert result["norms"] == found[0]["group of GPUs"]["norms"]
        assert result["norms"][0] == result["norms"][1] > 0
        assert result["replicas"] == [0.0, 1.0, 2.0, 3.0]
        assert result["objects"] == [[0, 1, 2, 3]] * 2
        assert result["is made once"] and result["its own"]


def test_groups_of_gpus_that_are_made_again() -> None:
    """What the first left in the store is not taken for the second's."""
    sums = run_ranks(over_groups_made_again, 2, "processes", timeout=60.0)
    assert sums == [[1.0, 1.0]] * 2


def test_a_killed_rank_of_a_group_of_gpus(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 1 died with exit code -9"):
        run_ranks(gather_from_the_dead, 2, "processes", (str(tmp_path),), timeout=60.0)
    told = (tmp_path / "0").read_text()
    assert told.startswith("PipelineError: cannot reach another replica: "), told
    assert "world group map" not in told


def test_a_killed_rank_that_has_the_store(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0 died with exit code -9"):
        run_ranks(lose_the_store, 2, "processes", (free_port(), str(tmp_path)), timeout=60.0)
    told = (tmp_path / "1").read_text()
    assert told.startswith("PipelineError: the rank that hosts the process group's store is gone: ")
    assert len(told.splitlines()) == 1, told  # without torch's C++ stack


def test_a_stopped_rank_that_has_the_store(tmp_path: Path) -> None:
    """Its connections stay, and its store does not answer: the others' time limit holds."""
    with pytest.raises(RuntimeError, match="rank 0 died with exit code -9"):
        run_ranks(stop_the_store, 2, "processes", (free_port(), str(tmp_path)), timeout=60.0)
    seconds, told = (tmp_path / "1").read_text().split(" ", 1)
    assert float(seconds) < 20.0  # the first look at the store has 10 s
    assert told.startswith("PipelineError: rank 1")
    assert "rank 1 has waited longer than 2 s: step 1, action" in told
    assert "\n  rank 0: unknown" in told and "\n  rank 1: step 1, action" in told


@pytest.mark.parametrize("ranks", ["threads", "processes"])
def test_a_rank_that_comes_late_to_clipping(ranks: Literal["threads", "processes"]) -> None:
    """Who waits gives up in time, and who comes late fails as well. Threads may go on after that.

    Processes end at once: nothing of the exchange waits on.
    """
    norm = math.sqrt(6 * 1.0 + 6 * 4.0)
    start = time.monotonic()
    for rank, (first, second) in enumerate(run_ranks(clip_late, 2, ranks, timeout=60.0)):
        assert first.error == "PipelineError", first
        if rank == 0:
            assert 1.9 < first.seconds < 4.0 and "waited 2" in first.text, first
        if ranks == "threads":
            assert first.text.startswith("rank 0 waited 2 s"), first.text
            assert second.value == pytest.approx(norm), second
    assert time.monotonic() - start < 40.0


def test_a_rank_that_fails_before_ranks_connect(found: list[dict[str, Any]]) -> None:
    for rank, outcome in enumerate(each["fails before it connects"] for each in found):
        assert outcome.is_a("RuntimeError" if rank == 0 else "PipelineError"), outcome
        assert "out of luck" in outcome.text and outcome.seconds < 10


def test_a_mapping_of_one_rank_alone(found: list[dict[str, Any]]) -> None:
    for result in found:
        outcome = result["other mapping"]
        assert outcome.is_a("ValueError") and outcome.seconds < 10
        assert "ranks differ in rank_mapping" in outcome.text
        assert "[1, 0, 2, 3]" in outcome.text and "[0, 1, 2, 3]" in outcome.text


def test_a_wrong_mapping(found: list[dict[str, Any]]) -> None:
    for result in found:
        outcome = result["wrong mapping"]
        assert outcome.is_a("ValueError")
        assert "rank_mapping=[0, 0, 1, 2]" in outcome.text and "0 to 3 once" in outcome.text


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    """The others raise within seconds, in this step and in any later one, and end."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 2 died with exit code -9"):
        run_ranks(die_in_a_step, 4, "processes", args=(str(tmp_path),), timeout=100.0)
    assert time.monotonic() - start < 60.0
    for rank in (0, 1, 3):
        first, second = torch.load(tmp_path / str(rank))
        assert first["error"] == "PipelineError", first
        assert first["seconds"] < 5.0, first["seconds"]
        assert "rank 2" in first["text"], first["text"]
        assert second["error"] == "PipelineError", second
        assert second["seconds"] < 12.0, second["seconds"]


LAUNCHER = """
import os, time
from pathlib import Path
from dualpipe_ext.testing import run_ranks

def stay(rank, num_ranks):
    Path(os.environ["READY"], str(rank)).touch()
    time.sleep(600)

if __name__ == "__main__":
    run_ranks(stay, 2, "processes")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_their_launcher(tmp_path: Path, number: signal.Signals) -> None:
    script, ready, scratch = tmp_path / "launch.py", tmp_path / "ready", tmp_path / "scratch"
    script.write_text(LAUNCHER)
    ready.mkdir()
    scratch.mkdir()
    path = os.pathsep.join(entry for entry in sys.path if entry)
    launcher = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path, "READY": str(ready), "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 100.0
        while len(list(ready.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(list(ready.iterdir())) == 2 and list(scratch.glob("dualpipe_ranks_*"))
    finally:
        launcher.send_signal(number)
    launcher.communicate(timeout=20.0)  # the ranks have the pipe's other end until they end
    assert not list(scratch.glob("dualpipe_ranks_*"))
