"""Ctrl-C ends a step that waits for another rank, at once and on every rank."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from interrupt_processes import (
    WAIT,
    after_a_step_within_a_step,
    interrupted_in_a_step,
    interrupted_in_exchanges,
    own_handler_in_a_step,
)

from dualpipe_ext.testing import run_ranks


@pytest.mark.measures
def test_ctrl_c_ends_a_step_that_waits() -> None:
    (interrupted, seconds), (other, _) = run_ranks(interrupted_in_a_step, 2, "processes")
    assert interrupted.startswith("KeyboardInterrupt")
    assert seconds < WAIT / 2
    assert other.startswith("PipelineError: rank 0 was interrupted (Ctrl-C)")


@pytest.mark.measures
def test_ctrl_c_ends_what_waits_outside_of_steps() -> None:
    first, second = run_ranks(interrupted_in_exchanges, 2, "processes", timeout=60.0)
    for outcome, seconds in first:
        assert outcome.startswith("KeyboardInterrupt") and seconds < WAIT / 4, first
    (constructing, _), _ = second
    assert constructing.startswith("PipelineError: rank 0 was interrupted (Ctrl-C)")


def test_a_handler_of_the_users_own_lets_the_step_end() -> None:
    assert run_ranks(own_handler_in_a_step, 2, "processes") == [
        ["noted", "the step is done"],
        ["the step is done"],
    ]


def test_a_step_within_a_step_leaves_ctrl_c_as_it_was() -> None:
    outcomes = run_ranks(after_a_step_within_a_step, 2, "processes", timeout=60.0)
    assert outcomes == ["KeyboardInterrupt"] * 2


@pytest.mark.measures
def test_ctrl_c_ends_ranks_that_are_threads() -> None:
    """And then the process, as it ends any other one."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS_STEPS],
        check=False,
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "KeyboardInterrupt" in done.stderr and "terminate" not in done.stderr
    assert time.monotonic() - start < 30.0


ENDLESS_STEPS = """
import os, signal, threading, torch
from torch import nn
from dualpipe_ext import Pipeline
from dualpipe_ext.testing import run_ranks

def train(rank, size):
    pipeline = Pipeline([nn.Linear(3, 3)], "1f1b")
    x = torch.ones(8, 3)
    while True:
        pipeline.step(
            None if rank else x,
            num_chunks=4,
            criterion=nn.functional.mse_loss,
            labels=(x if rank else None,),
        )

signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
run_ranks(train, 2)
"""
