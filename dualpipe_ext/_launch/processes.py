"""Ranks that are processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing as mp

from dualpipe_ext._launch.rank_process import Output, path_of_result, path_of_stacks, run_rank
from dualpipe_ext._launch.waiting import first_cause, time_of_end, too_late, wait

__all__ = ["run_processes"]

# Each rank begins as a new process, with the current environment. A test suite that starts hundreds
# of them may choose "forkserver" and preload what they all import.
START_METHOD = "spawn"


def run_processes(
    fn: Callable[..., Any], num_ranks: int, args: Sequence[Any], timeout: float | None
) -> list[Any]:
    """Starts a process for each rank; returns and raises as :func:`dualpipe_ext.testing.run_ranks`."""
    _check_can_be_imported(fn)
    context: Any = mp.get_context(START_METHOD)
    output = Output() if START_METHOD == "forkserver" else None  # others inherit the launcher's
    with tempfile.TemporaryDirectory(prefix="dualpipe_ranks_") as folder:
        processes = [
            context.Process(
                target=run_rank,
                args=(fn, rank, num_ranks, folder, tuple(args), output, time_of_end(timeout)),
                daemon=False,
            )
            for rank in range(num_ranks)
        ]
        try:
            _start(processes, fn)
            wait(
                lambda: any(process.is_alive() for process in processes),
                lambda: any(process.exitcode not in (None, 0) for process in processes),
                timeout,
            )
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
            if not any(process.exitcode for process in processes):
                _print_stacks(folder, late)
        finally:
            for process in (one for one in processes if one.pid is not None):
                process.kill()
                process.join()
        return _collect(folder, processes, late, timeout)


def _check_can_be_imported(fn: Callable[..., Any]) -> None:
    """Raises if processes could not find the function, or would start processes themselves."""
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        raise RuntimeError(
            "run_ranks() was called while a rank imports the main module of its launcher; put the "
            'call below: if __name__ == "__main__":'
        )
    main = getattr(sys.modules["__main__"], "__file__", None)
    if getattr(fn, "__module__", None) == "__main__" and not (main and os.path.exists(main)):
        raise ValueError(
            f"processes cannot import {fn!r}: what is typed in, or read from stdin, is in no file; "
            f"put it into one, or use ranks='threads'"
        )


def _start(processes: Sequence[Any], fn: Callable[..., Any]) -> None:
    try:
        for process in processes:
            process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"processes cannot be sent {fn!r} and its args: {error}; use a function at the top "
            f"level of a module, no lambda or inner function, and args that can be pickled, or "
            f"ranks='threads'"
        ) from error


def _print_stacks(folder: str, ranks: Sequence[int]) -> None:
    """Prints the stacks that late ranks write into files."""
    deadline = time.monotonic() + 1.0
    texts: dict[int, str] = {}
    while len(texts) < len(ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
        texts = {rank: text for rank in ranks if (text := _stacks_of(folder, rank))}
    for rank, text in texts.items():
        print(f"\nrank {rank} is not through:\n{text}", file=sys.stderr, flush=True)


def _stacks_of(folder: str, rank: int) -> str:
    try:
        with open(path_of_stacks(folder, rank)) as file:
            return file.read()
    except FileNotFoundError:  # the rank has not even started
        return ""


def _collect(
    folder: str, processes: Sequence[Any], late: Sequence[int], timeout: float | None
) -> list[Any]:
    results: list[Any] = []
    errors: dict[int, BaseException] = {}
    for rank, process in enumerate(processes):
        path = path_of_result(folder, rank)
        if os.path.exists(path):
            ok, value = torch.load(path, weights_only=False)
            if ok:
                results.append(value)
            else:
                errors[rank] = value
        elif rank not in late:
            errors[rank] = RuntimeError(
                f"rank {rank} died with exit code {process.exitcode}; what it wrote to stderr may say "
                f"why"
            )
    if errors:
        raise first_cause(errors)
    if len(results) < len(processes):
        raise too_late(late, len(processes), timeout)
    return results
