"""Ctrl-C ends a step that waits for another rank, at once and on every rank."""

from __future__ import annotations

from interrupt_processes import WAIT, interrupted_in_a_step

from dualpipe_ext.testing import run_ranks


def test_ctrl_c_ends_a_step_that_waits() -> None:
    (interrupted, seconds), (other, _) = run_ranks(interrupted_in_a_step, 2, "processes")
    assert interrupted.startswith("KeyboardInterrupt")
    assert seconds < WAIT / 2
    assert other.startswith("PipelineError: rank 0 was interrupted (Ctrl-C)")
