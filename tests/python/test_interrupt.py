"""Ctrl-C ends a step that waits for another rank, at once and on every rank."""

from __future__ import annotations

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
