"""Checks whether the processes of a benchmark can have all their streams on the GPU at once.

Clients of MPS take their hardware queues from one pool; one that comes too late gets an error. Their
streams must also be able to wait for words in host memory, as messages by copy engines do.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.synchronize import Barrier

import torch
from cuda_calls import RegisteredPage, new_stream, priorities, wait_for_value

NUM_CLIENTS = 4
NUM_STREAMS = 15  # twelve for the ways of a rank, one that computes, two that sum
PATIENCE_S = 25.0


def client(all_here: Barrier) -> None:
    """Uses all streams, and stays until every other client has done so."""
    torch.cuda.synchronize()
    page = RegisteredPage()
    page.word.value = 1
    for number in range(NUM_STREAMS):
        stream = new_stream(priorities()[number % 2])
        wait_for_value(stream, page.address, 1)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    all_here.wait(PATIENCE_S)
    os._exit(0)


def main() -> None:
    """Starts all clients; the exit status is 1 if one fails or does not answer."""
    fork = multiprocessing.get_context("fork")
    all_here = fork.Barrier(NUM_CLIENTS)
    clients = [fork.Process(target=client, args=(all_here,)) for _ in range(NUM_CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(PATIENCE_S)
        each.kill()
        each.join(1.0)
    if any(each.exitcode for each in clients):
        raise SystemExit("not all clients were served")


if __name__ == "__main__":
    main()
