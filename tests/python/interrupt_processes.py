"""What the processes of test_interrupt.py run: importable by name, as started processes need it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from dualpipe_ext import DualPipe, PipelineError

WAIT = 8.0


def interrupted_in_a_step(rank: int, num_ranks: int) -> tuple[str, float]:
    """Ctrl-C on rank 0, which waits in step() for rank 1; what ended the step, and after how long."""
    # A shell starts what it runs in the background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.manual_seed(rank)
    model = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
    x = torch.zeros(4, 4)

    def step() -> None:
        model.step(x, num_chunks=4, criterion=nn.functional.mse_loss, labels=(x,))

    step()
    if rank == 1:
        time.sleep(WAIT)
    else:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start, outcome = time.monotonic(), "nothing was raised"
    try:
        step()
    except (KeyboardInterrupt, PipelineError) as error:
        outcome = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    if rank == 0:
        time.sleep(WAIT)  # until rank 1 has been through it, too
    step()
    return outcome, seconds


def interrupted_in_exchanges(rank: int, num_ranks: int) -> list[tuple[str, float]]:
    """Ctrl-C on rank 0, which waits for rank 1: to construct a pipeline, then to clip gradients."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes = []

    def attempt(call: Callable[[], object]) -> None:
        start, outcome = time.monotonic(), ""
        if rank == 1:
            time.sleep(WAIT / 2)
        else:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            call()
        except (KeyboardInterrupt, PipelineError) as error:
            outcome = f"{type(error).__name__}: {error}"
        outcomes.append((outcome, time.monotonic() - start))

    attempt(lambda: DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)]))
    model = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
    attempt(lambda: model.clip_grad_norm_(1.0))
    return outcomes


def own_handler_in_a_step(rank: int, num_ranks: int) -> list[str]:
    """Ctrl-C while rank 0 waits, where the user's own handler only takes note of it."""
    notes: list[str] = []
    signal.signal(signal.SIGINT, lambda *_: notes.append("noted"))
    model = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
    x = torch.zeros(4, 4)
    if rank == 1:
        time.sleep(2.0)
    else:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    model.step(x, num_chunks=4, criterion=nn.functional.mse_loss, labels=(x,))
    return [*notes, "the step is done"]


def after_a_step_within_a_step(rank: int, num_ranks: int) -> str:
    """Ctrl-C after a step whose criterion ran a pipeline of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    teacher = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
    model = DualPipe([nn.Linear(4, 4), nn.Linear(4, 4)])
    x = torch.zeros(4, 4)

    def criterion(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher.step(x, num_chunks=4)
        return nn.functional.mse_loss(output, target)

    model.step(x, num_chunks=4, criterion=criterion, labels=(x,))
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return "KeyboardInterrupt"
    return "nothing was raised"
