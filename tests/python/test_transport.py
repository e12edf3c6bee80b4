"""Transports between threads and between processes keep one contract; dead ranks are named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from transport_checks import CHECKS, Ends, outcome_of, tensor
from transport_processes import (
    Outcomes,
    gloo_loop_policies,
    mapped_ring,
    run_all_in_a_process,
    run_to_death,
)

from dualpipe_ext import _C
from dualpipe_ext.testing import run_ranks


def run_in_threads(name: str) -> list[str]:
    """One check on two threads of this process."""
    hub = _C.LoopbackHub(2)
    barrier = threading.Barrier(2, timeout=30)
    outcomes = ["", ""]

    def run(rank: int) -> None:
        ends = Ends(rank, hub.transport(rank), hub.control_plane(rank), barrier.wait)
        outcomes[rank] = outcome_of(CHECKS[name], ends)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.fixture(scope="module")
def process_outcomes() -> list[Outcomes]:
    """The outcomes of all checks, by rank: two processes for all of them."""
    return run_ranks(run_all_in_a_process, 2, "processes", timeout=120.0)


@pytest.mark.parametrize("name", CHECKS)
def test_threads(name: str) -> None:
    """Loopback holds the check on both ranks."""
    assert run_in_threads(name) == ["", ""]


@pytest.mark.parametrize("name", CHECKS)
def test_processes(name: str, process_outcomes: list[Outcomes]) -> None:
    """The process group transport over gloo holds the check on both ranks."""
    assert [outcomes[name] for outcomes in process_outcomes] == ["", ""]


def test_a_function_that_decides_on_faults_holds_nobody_up() -> None:
    """It needs the interpreter lock, which a rank holds that comes or goes meanwhile."""
    hub = _C.LoopbackHub(2)
    hub.inject(lambda *_: _C.Fault.DROP)
    sender = hub.transport(0)
    sender.begin_step(1, 1, "a step")

    def send() -> None:
        for _ in range(5000):
            sender.send(1, _C.MessageKind.ACTIVATION, 1, 0, [])

    thread = threading.Thread(target=send)
    thread.start()
    while thread.is_alive():
        hub.transport(1)  # gone at once
    thread.join()


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="gloo's loop has no name before torch 2.13",
)
def test_gloo_does_not_preempt() -> None:
    """Its loop would poll for a lock that the thread it took the core from holds."""
    policies = [[os.SCHED_OTHER], [os.SCHED_BATCH]]
    assert run_ranks(gloo_loop_policies, 2, "processes") == [policies, policies]


def test_pipeline_ranks_may_differ_from_group_ranks() -> None:
    """Messages and texts go by the pipeline's ranks."""
    texts = ["at 2", "at 1", "at 0"]
    assert run_ranks(mapped_ring, 3, "processes") == [["1", *texts], ["0", *texts], ["2", *texts]]


@pytest.mark.measures
def test_a_killed_process_is_named_within_three_seconds(tmp_path: Path) -> None:
    """SIGKILL on one rank ends the wait of the other, and both later calls and the store say so."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes = [
        context.Process(target=run_to_death, args=(rank, port, tmp_path)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    exit_codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert exit_codes == [-signal.SIGKILL, 0]
    assert (tmp_path / "survived").exists()


def test_injected_faults() -> None:
    """A hub loses or refuses the messages that the test chooses."""
    hub = _C.LoopbackHub(2)
    ends = [Ends(r, hub.transport(r), hub.control_plane(r), lambda: None) for r in range(2)]
    faults = {1: _C.Fault.FAIL, 2: _C.Fault.DROP}

    def choose(source: Any, to: Any, kind: _C.MessageKind, stage: Any, number: Any) -> _C.Fault:
        assert (source, to, kind, stage) == (0, 1, _C.MessageKind.ACTIVATION, 1)
        return faults.get(number, _C.Fault.NONE)

    hub.inject(choose)
    for end in ends:
        end.transport.begin_step(1, 1, "faults")
    ends[0].send(0, [tensor(4)])
    assert ends[1].receive(0).wait() == [tensor(4)]
    with pytest.raises(
        _C.PipelineError, match="the link failed on the activation of micro-batch 1"
    ):
        ends[0].send(1, [])
    ends[0].send(2, [])
    hub.inject(None)
    ends[0].send(3, [])
    with pytest.raises(_C.PipelineError, match="expected the activation of micro-batch 2"):
        ends[1].receive(2).wait()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: _C.LoopbackHub(0), ValueError, "at least 1 is needed"),
        (lambda: _C.LoopbackHub(2).transport(2), ValueError, "has ranks 0 to 1"),
        (lambda: _C.StoreExchange(object(), 0), TypeError, "found object"),
        (lambda: _C.LoopbackHub(2).all_gather(0, "", 0.02), _C.PipelineError, r"rank\(s\) 1 of 2"),
    ],
)
def test_mistakes_are_explained(
    call: Callable[[], object], error: type[Exception], text: str
) -> None:
    """What was found and what is allowed."""
    with pytest.raises(error, match=text):
        call()
