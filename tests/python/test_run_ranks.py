"""Running ranks: ends that others must hear of, and functions that processes cannot be sent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from models import squared_error
from outcomes import Outcome, attempt
from process_ranks import say
from torch import nn

from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline
from dualpipe_ext.testing import run_ranks


def step(pipeline: DualPipe) -> Outcome:
    x = torch.ones(4, 4)
    return attempt(pipeline.step, x, num_chunks=4, criterion=squared_error, labels=(x,))


@pytest.mark.measures
@pytest.mark.parametrize("place", ["before the pipeline", "before a step", "after two steps"])
def test_a_thread_that_ends_is_not_waited_for(place: str) -> None:
    found = []

    def rank_fn(rank: int, num_ranks: int) -> None:
        if rank == 1 and place == "before the pipeline":
            raise LookupError("no data")
        made = attempt(DualPipe, [nn.Linear(4, 4), nn.Linear(4, 4)])
        if made.error:
            found.append(made)
            return
        steps = 2 if place == "after two steps" else 0
        assert not any(step(made.value).error for _ in range(steps))
        if rank == 1:
            raise LookupError("no data")
        found.append(step(made.value))

    start = time.monotonic()
    with pytest.raises(LookupError, match="no data"):
        run_ranks(rank_fn, 2)
    assert time.monotonic() - start < 5.0
    (outcome,) = found
    assert outcome.error == "PipelineError" and outcome.seconds < 4.0
    assert "rank 1 has ended: LookupError: no data" in outcome.text
    assert f"{__file__}(" in outcome.text


def test_seeds_of_threads_are_warned_of() -> None:
    def rank_fn(rank: int, num_ranks: int) -> None:
        Pipeline([nn.Linear(4, 4)], "1f1b", config=DualPipeConfig(seed=3))

    with pytest.warns(UserWarning, match="seed=3 cannot hold for ranks that are threads"):
        run_ranks(rank_fn, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_ranks(rank_fn, 1)


def test_a_function_that_processes_cannot_be_sent() -> None:
    with pytest.raises(TypeError, match=r"<lambda>.* top level of a module"):
        run_ranks(lambda rank, num_ranks: None, 2, "processes")
    with pytest.raises(TypeError, match=r"args that can be pickled"):
        run_ranks(step, 2, "processes", args=(time.sleep, (i for i in range(3))))


def test_processes_write_where_their_launcher_does(capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(say, 2, "processes")
    written = capfd.readouterr()
    assert sorted(written.out.split()) == ["0", "1"]
    assert sorted(written.err.split()) == ["10", "11"]


SCRIPT = """
from dualpipe_ext.testing import run_ranks

def rank_fn(rank, num_ranks):
    return rank

run_ranks(rank_fn, 1, "processes")
"""


def run(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, *command],
        input=text,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("command", [("-",), ("-c", SCRIPT)])
def test_a_function_in_no_file(command: tuple[str, ...]) -> None:
    result = run(*command, text=SCRIPT)
    assert result.returncode == 1
    assert "ValueError: processes cannot import" in result.stderr
    assert "put it into one, or use ranks='threads'" in result.stderr


def test_a_main_module_without_a_guard(tmp_path: Path) -> None:
    path = tmp_path / "no_guard.py"
    path.write_text(SCRIPT)
    result = run(str(path))
    assert result.returncode == 1
    assert 'put the call below: if __name__ == "__main__":' in result.stderr
    assert "rank 0 died with exit code 1; what it wrote" in result.stderr
