"""A rank that is a process: runs the function, and leaves its result or error in a file."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.reduction import DupFd
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Output", "path_of_result", "path_of_stacks", "run_rank"]


def run_rank(
    fn: Callable[..., Any],
    rank: int,
    num_ranks: int,
    folder: str,
    args: tuple[Any, ...],
    _: Output | None,
    time_of_end: float,
) -> None:
    """The main function of a rank's process.

    Args:
        fn: called as ``fn(rank, num_ranks, *args)``.
        rank: the rank of this process.
        num_ranks: the number of ranks.
        folder: where the ranks meet and leave their results.
        args: further arguments.
        _: redirects this process's output to the launcher's, just by being received.
        time_of_end: when to write stacks, on the monotonic clock.
    """
    _end_with_launcher(folder)
    if not os.path.isdir(folder):  # the launcher is gone; the store would wait for its folder
        sys.exit(1)
    _write_stacks_at(time_of_end, path_of_stacks(folder, rank))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    try:
        outcome = (True, fn(rank, num_ranks, *args))
    except Exception as error:  # noqa: BLE001 - travels to the caller
        outcome = (False, _portable(error))
    path = path_of_result(folder, rank)
    torch.save(outcome, path + ".part")
    os.replace(path + ".part", path)
    dist.destroy_process_group()
    if not outcome[0]:
        sys.exit(1)


def path_of_result(folder: str, rank: int) -> str:
    """Returns where a finished rank leaves ``(True, result)`` or ``(False, error)``."""
    return os.path.join(folder, f"{rank}.pt")


def path_of_stacks(folder: str, rank: int) -> str:
    """Returns where a rank that does not finish in time leaves its stacks."""
    return os.path.join(folder, f"{rank}.stacks")


class Output:
    """Standard output and error of the launcher; they become those of a rank that receives this."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _write_to, (DupFd(1), DupFd(2))


def _write_to(*duplicates: Any) -> None:
    for descriptor, duplicate in enumerate(duplicates, 1):
        received = duplicate.detach()
        os.dup2(received, descriptor)
        os.close(received)


def _write_stacks_at(time_of_end: float, path: str) -> None:
    """Arranges for the stacks of this process to be written at a time of the monotonic clock.

    A thread writes them that does not need the interpreter lock, which may never be released.
    """
    seconds = max(time_of_end - time.monotonic(), 0.001)
    if seconds < threading.TIMEOUT_MAX:
        faulthandler.dump_traceback_later(seconds, file=open(path, "w"))  # noqa: SIM115 - until then


def _end_with_launcher(folder: str) -> None:
    """Ends this process once the one that started it is gone and can no longer do so itself."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def watch() -> None:
        wait_for_any([launcher.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="launcher's watch", daemon=True).start()


class _KeyError(KeyError):
    """Shows its text as it is, unlike ``KeyError``, which shows its ``repr()``."""

    def __str__(self) -> str:
        return str(self.args[0])


def _portable(error: Exception) -> BaseException:
    """Returns the error with its traceback as text, which survives pickling."""
    text = "".join(traceback.format_exception(error))
    try:
        kind = _KeyError if type(error) is KeyError else type(error)
        copy = kind(f"{error}\n\nraised on a rank:\n{text}")
    except Exception:  # noqa: BLE001 - an exception type with another signature
        return RuntimeError(text)
    copy.is_origin = error.__cause__ is not None  # type: ignore[attr-defined]
    return copy
