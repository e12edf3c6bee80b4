"""Running a function on several ranks of one machine, as threads or as processes."""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.reduction import DupFd
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dualpipe_ext._C import Fault, MessageKind, PipelineError
from dualpipe_ext._failure import describe
from dualpipe_ext.groups import FaultInjector, LoopbackGroup, LoopbackHubs

__all__ = ["Fault", "FaultInjector", "MessageKind", "run_ranks"]

RankFunction = Callable[..., Any]

# Each rank begins as a new process does, with the environment of now. A test suite that starts
# hundreds may choose "forkserver" and preload what they all import.
START_METHOD = "spawn"


def run_ranks(
    fn: RankFunction,
    num_ranks: int,
    ranks: Literal["threads", "processes"] = "threads",
    args: Sequence[Any] = (),
    timeout: float | None = None,
    link_latency: float = 0.0,
    link_bandwidth: float = 0.0,
    faults: FaultInjector | None = None,
) -> list[Any]:
    """Calls ``fn(rank, num_ranks, *args)`` on every rank and returns the results, by rank.

    On GPUs a rank that is a thread has a current stream of its own, on the caller's current device,
    which begins after what the caller has issued and is through when its results are returned.

    Every rank computes with one thread: more of them would fight over the same cores. Ranks that
    are processes end with the process that started them, whatever ends it. Ranks that are threads
    share torch's generator of random numbers: ``torch.manual_seed`` on one of them disturbs the
    others, and numbers come in no certain order. Draw before, or from a ``torch.Generator``.

    Args:
        fn: for processes, a function that can be imported: it is sent to them by name.
        num_ranks: how many there are.
        ranks: ``"threads"`` of this process, which exchange messages in memory, or
            ``"processes"`` with torch's gloo backend as their default group.
        args: further arguments of ``fn``, the same on every rank.
        timeout: seconds for everything; no limit where left out. After it, what each rank that is
            not through is doing is printed to stderr (its Python stacks), TimeoutError is raised,
            and ranks that are processes are killed.
        link_latency: threads only: seconds that every message takes.
        link_bandwidth: threads only: bytes a second of each channel; 0: unlimited.
        faults: threads only: ``faults(source, destination, kind, stage, microbatch)`` is asked for
            every message that is sent; ``Fault.DROP`` loses it, ``Fault.FAIL`` breaks the link.

    Raises:
        Exception: the first error of a rank that is not the echo of another rank's.
        TimeoutError: a rank was not through after ``timeout`` seconds, and none had failed.
        ValueError: an unknown kind of ranks, link options for processes, or a function in no file.
        TypeError: ``fn`` or ``args`` cannot be sent to processes.
    """
    if ranks == "threads":
        hubs = LoopbackHubs(num_ranks, link_latency, link_bandwidth, faults)
        return _run_threads(fn, hubs, args, timeout)
    if ranks != "processes":
        raise ValueError(f"ranks={ranks!r}: choose 'threads' or 'processes'")
    if link_latency or link_bandwidth or faults:
        raise ValueError("link_latency, link_bandwidth and faults are for ranks='threads'")
    _check_can_be_imported(fn)
    return _run_processes(fn, num_ranks, args, timeout)


def _run_threads(
    fn: RankFunction, hubs: LoopbackHubs, args: Sequence[Any], timeout: float | None
) -> list[Any]:
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
        _wait(
            lambda: any(thread.is_alive() for thread in threads),
            lambda: bool(errors),
            timeout,
        )
    missing = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if missing and not errors:
        faulthandler.dump_traceback(file=2, all_threads=True)  # past any capturing of stderr
        raise _too_late(missing, hubs.num_ranks, timeout)
    if errors:
        raise _first_cause(errors)
    return results


@contextmanager
def _stream_after(issued: torch.cuda.Stream | None) -> Iterator[None]:
    """A current stream of this thread's own: on the default one, ranks would wait for each other."""
    if issued is None:
        yield
        return
    with torch.cuda.device(issued.device):
        # The streams that NCCL waits on by itself have the default priority. In a hardware queue with
        # one of them, a rank's computation would wait for messages that wait for it.
        stream = torch.cuda.Stream(priority=-1)
        stream.wait_stream(issued)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def _multiply_once() -> None:
    """Has cuBLAS allocate its memory of each thread, which may wait for all work on the device.

    Within a step, that work may wait for another rank, whose turn would never come.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.ones(16, 16, device="cuda", dtype=dtype)
        weight = torch.ones_like(x, requires_grad=True)
        with torch.enable_grad():
            torch.nn.functional.linear(x, weight, x[0]).sum().backward()
    torch.cuda.current_stream().synchronize()


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Torch's operations run on the thread that calls them."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _first_cause(errors: dict[int, BaseException]) -> BaseException:
    """The error that started it: not one that only repeats what happened on another rank."""
    by_rank = [errors[rank] for rank in sorted(errors)]
    causes = [e for e in by_rank if not isinstance(e, (PipelineError, TimeoutError))]
    origins = [e for e in by_rank if e.__cause__ is not None or getattr(e, "is_origin", False)]
    return (causes or origins or by_rank)[0]


def _check_can_be_imported(fn: RankFunction) -> None:
    """Raises where processes could not find the function, or would start processes themselves."""
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


def _start(processes: Sequence[Any], fn: RankFunction) -> None:
    try:
        for process in processes:
            process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"processes cannot be sent {fn!r} and its args: {error}; use a function at the top "
            f"level of a module, no lambda or inner function, and args that can be pickled, or "
            f"ranks='threads'"
        ) from error


def _run_processes(
    fn: RankFunction, num_ranks: int, args: Sequence[Any], timeout: float | None
) -> list[Any]:
    context: Any = mp.get_context(START_METHOD)
    output = _Output() if START_METHOD == "forkserver" else None  # else the launcher's already
    with tempfile.TemporaryDirectory(prefix="dualpipe_ranks_") as folder:
        processes = [
            context.Process(
                target=_process_main,
                args=(fn, rank, num_ranks, folder, tuple(args), output, _time_of_end(timeout)),
                daemon=False,
            )
            for rank in range(num_ranks)
        ]
        try:
            _start(processes, fn)
            _wait(
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


def _time_of_end(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout


def _wait(running: Callable[[], bool], failed: Callable[[], bool], timeout: float | None) -> None:
    """Waits for all ranks; once one has failed, the others have some seconds to notice."""
    deadline = _time_of_end(timeout)
    patience = 15.0
    pause = 0.0002
    while running():
        if patience and failed():
            deadline = min(deadline, time.monotonic() + patience)
            patience = 0.0
        if time.monotonic() > deadline:
            return
        time.sleep(pause)
        pause = min(2 * pause, 0.01)


def _too_late(late: Sequence[int], num_ranks: int, timeout: float | None) -> TimeoutError:
    which = f"ranks {', '.join(map(str, late))} were" if len(late) > 1 else f"rank {late[0]} was"
    return TimeoutError(
        f"{which} not through within timeout={timeout:g} s, of {num_ranks} ranks; their stacks are "
        f"on stderr: if they were at work, give run_ranks() a longer timeout=, or none for no limit"
    )


def _print_stacks(folder: str, ranks: Sequence[int]) -> None:
    """Prints what ranks write into files when their time is over."""
    deadline = time.monotonic() + 1.0
    texts: dict[int, str] = {}
    while len(texts) < len(ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
        texts = {rank: text for rank in ranks if (text := _stacks_of(folder, rank))}
    for rank, text in texts.items():
        print(f"\nrank {rank} is not through:\n{text}", file=sys.stderr, flush=True)


def _stacks_of(folder: str, rank: int) -> str:
    try:
        with open(_path_of_stacks(folder, rank)) as file:
            return file.read()
    except FileNotFoundError:  # it has not even begun
        return ""


def _path_of_stacks(folder: str, rank: int) -> str:
    return os.path.join(folder, f"{rank}.stacks")


def _collect(
    folder: str, processes: Sequence[Any], late: Sequence[int], timeout: float | None
) -> list[Any]:
    results: list[Any] = []
    errors: dict[int, BaseException] = {}
    for rank, process in enumerate(processes):
        path = os.path.join(folder, f"{rank}.pt")
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
        raise _first_cause(errors)
    if len(results) < len(processes):
        raise _too_late(late, len(processes), timeout)
    return results


class _Output:
    """Standard output and error of the launcher, which become those of a rank that is sent them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _write_to, (DupFd(1), DupFd(2))


def _write_to(*duplicates: Any) -> None:
    for descriptor, duplicate in enumerate(duplicates, 1):
        received = duplicate.detach()
        os.dup2(received, descriptor)
        os.close(received)


def _process_main(
    fn: RankFunction,
    rank: int,
    num_ranks: int,
    folder: str,
    args: tuple[Any, ...],
    _: _Output | None,
    time_of_end: float,
) -> None:
    _end_with_launcher(folder)
    _write_stacks_at(time_of_end, _path_of_stacks(folder, rank))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    try:
        outcome = (True, fn(rank, num_ranks, *args))
    except Exception as error:  # noqa: BLE001 - travels to the caller
        outcome = (False, _portable(error))
    path = os.path.join(folder, f"{rank}.pt")
    torch.save(outcome, path + ".part")
    os.replace(path + ".part", path)
    dist.destroy_process_group()
    if not outcome[0]:
        sys.exit(1)


def _write_stacks_at(time_of_end: float, path: str) -> None:
    """Has the stacks of this process written at a time of the monotonic clock, which all share.

    By a thread that needs no lock of the interpreter's: the process may never give that back.
    """
    seconds = max(time_of_end - time.monotonic(), 0.001)
    if seconds < threading.TIMEOUT_MAX:
        faulthandler.dump_traceback_later(seconds, file=open(path, "w"))  # noqa: SIM115 - until then


def _end_with_launcher(folder: str) -> None:
    """Ends this process once the one that started it is gone, which can no longer do so itself."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def watch() -> None:
        wait_for_any([launcher.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="launcher's watch", daemon=True).start()


class _KeyError(KeyError):
    """Shows its text as it is, where ``KeyError`` shows how it would be written in a program."""

    def __str__(self) -> str:
        return str(self.args[0])


def _portable(error: Exception) -> BaseException:
    """The error with its traceback as text, which survives pickling."""
    text = "".join(traceback.format_exception(error))
    try:
        kind = _KeyError if type(error) is KeyError else type(error)
        copy = kind(f"{error}\n\nraised on a rank:\n{text}")
    except Exception:  # noqa: BLE001 - an exception type with another signature
        return RuntimeError(text)
    copy.is_origin = error.__cause__ is not None  # type: ignore[attr-defined]
    return copy
