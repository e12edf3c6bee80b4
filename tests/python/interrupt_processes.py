"""What the processes of test_interrupt.py run: importable by name, as started processes need it."""

from __future__ import annotations

import os
import signal
import threading
import time

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
