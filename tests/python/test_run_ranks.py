"""Running ranks: ends that others must hear of, and functions that processes cannot be sent."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from models import squared_error
from outcomes import Outcome, attempt
from process_ranks import say, stay_if_even
from torch import nn

from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline
from dualpipe_ext._launch.rank_process import run_rank
from dualpipe_ext.testing import run_ranks

TOO_LATE = r"^ranks 0, 2 were not through within timeout=(0.2|5) s, of 3 ranks; .* a longer timeout=, or none"


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


def test_threads_that_take_longer_than_they_may(capfd: pytest.CaptureFixture[str]) -> None:
    through = threading.Event()

    def stay_if_even(rank: int, num_ranks: int) -> None:
        assert rank % 2 or through.wait(60.0)

    try:
        with pytest.raises(TimeoutError, match=TOO_LATE):
            run_ranks(stay_if_even, 3, timeout=0.2)
    finally:
        through.set()
    assert capfd.readouterr().err.count("in stay_if_even") == 2


@pytest.mark.measures  # in these seconds all have started and one has ended
def test_processes_that_take_longer_than_they_may(capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(say, 1, "processes")  # what they are forked from takes its time to start
    with pytest.raises(TimeoutError, match=TOO_LATE):
        run_ranks(stay_if_even, 3, "processes", timeout=5.0)
    _, zero, two = re.split(r"rank (?:0|2) is not through:\n", capfd.readouterr().err)
    assert zero.count("in stay_if_even") == two.count("in stay_if_even") == 1


@pytest.mark.parametrize("ranks", ["threads", "processes"])
@pytest.mark.parametrize("timeout", [math.inf, 1e10])
def test_more_time_than_there_is(ranks: Literal["threads", "processes"], timeout: float) -> None:
    assert run_ranks(say, 1, ranks, timeout=timeout) == [None]


def test_there_is_no_limit_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says that a year passes at each look at it."""
    years = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(years) * 3e7, sleep=time.sleep)
    monkeypatch.setattr("dualpipe_ext._launch.waiting.time", clock)

    def rank_fn(rank: int, num_ranks: int) -> int:
        time.sleep(0.2)
        return rank

    assert run_ranks(rank_fn, 2) == [0, 1]
    with pytest.raises(TimeoutError):
        run_ranks(rank_fn, 2, timeout=300.0)


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


def test_a_rank_whose_launcher_is_gone_before_it_has_started(tmp_path: Path) -> None:
    """Its folder is gone too, which the store would wait for."""
    gone = str(tmp_path / "gone")
    arguments = (say, 0, 2, gone, (), None, time.monotonic() + 60.0)
    rank = multiprocessing.get_context("spawn").Process(target=run_rank, args=arguments)
    rank.start()
    rank.join(60.0)
    assert rank.exitcode == 1
