"""Ranks that are threads of this process."""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from typing import Any

import torch

from dualpipe_ext._C import noting_interrupts
from dualpipe_ext._failure import describe
from dualpipe_ext._launch.waiting import first_cause, too_late, wait
from dualpipe_ext.groups import LoopbackGroup, LoopbackHubs

__all__ = ["run_threads"]

INTERRUPT_PATIENCE_S = 5.0


def run_threads(
    fn: Callable[..., Any], hubs: LoopbackHubs, args: Sequence[Any], timeout: float | None
) -> list[Any]:
    """Starts a thread for each rank; returns and raises as :func:`dualpipe_ext.testing.run_ranks`."""
    results: list[Any] = [None] * hubs.num_ranks
    errors: dict[int, BaseException] = {}
    grad_enabled = torch.is_grad_enabled()
    issued = torch.cuda.current_stream() if torch.cuda.is_available() else None
    all_ready = threading.Barrier(hubs.num_ranks)

    def run(rank: int) -> None:
        group = LoopbackGroup(hubs, rank)
        try:
            with group, torch.set_grad_enabled(grad_enabled), _stream_after(issued):
                if issued is not None:
                    _multiply_once()
                    all_ready.wait()
                results[rank] = fn(rank, hubs.num_ranks, *args)
        except BaseException as error:  # noqa: BLE001 - reported by the caller's thread
            errors[rank] = error
            all_ready.abort()
            group.leave(f"rank {rank} has ended: {describe(error, error.__traceback__)}")

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True)
        for rank in range(hubs.num_ranks)
    ]
    with _single_threaded():
        for thread in threads:
            thread.start()
        noting_interrupts(lambda: _wait(threads, errors, timeout))
    missing = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if missing and not errors:
        faulthandler.dump_traceback(file=2, all_threads=True)  # past any capturing of stderr
        raise too_late(missing, hubs.num_ranks, timeout)
    try:
        if errors:
            raise first_cause(errors)
    finally:
        errors.clear()  # their frames refer to this one, and would keep the ranks' pipelines alive
    return results


def _wait(threads: Sequence[threading.Thread], errors: Sized, timeout: float | None) -> None:
    def are_running() -> bool:
        return any(thread.is_alive() for thread in threads)

    try:
        wait(are_running, lambda: bool(errors), timeout)
    except KeyboardInterrupt:
        # It ends steps. If a thread were still in one at the exit of the interpreter, that would be
        # the end of the process.
        wait(are_running, lambda: False, INTERRUPT_PATIENCE_S)
        raise


@contextmanager
def _stream_after(issued: torch.cuda.Stream | None) -> Iterator[None]:
    """Gives this thread its own current stream: on the default one, ranks would wait for others."""
    if issued is None:
        yield
        return
    with torch.cuda.device(issued.device):
        # The streams on which NCCL itself waits have the default priority. In a hardware queue with
        # one of them, a rank's computation would wait for messages that wait for this computation.
        stream = torch.cuda.Stream(priority=-1)
        stream.wait_stream(issued)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def _multiply_once() -> None:
    """Makes cuBLAS allocate its memory per thread now, as this may wait for all work on the device.

    Within a step, such work may in turn wait for another rank, whose turn would never come.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.ones(16, 16, device="cuda", dtype=dtype)
        weight = torch.ones_like(x, requires_grad=True)
        with torch.enable_grad():
            torch.nn.functional.linear(x, weight, x[0]).sum().backward()
    with suppress(RuntimeError, TypeError):  # not all versions of torch have such products
        narrow = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
        torch.addmm(narrow.float(), narrow, narrow, out_dtype=torch.float32)
    torch.cuda.current_stream().synchronize()


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Makes torch's operations run only on the thread that calls them."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
