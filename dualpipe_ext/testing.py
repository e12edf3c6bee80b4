"""Runs a function on several ranks of one machine, as threads or as processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from dualpipe_ext._C import Fault, MessageKind
from dualpipe_ext._launch.processes import run_processes
from dualpipe_ext._launch.threads import run_threads
from dualpipe_ext.groups import FaultInjector, LoopbackHubs

__all__ = ["Fault", "FaultInjector", "MessageKind", "run_ranks"]


def run_ranks(
    fn: Callable[..., Any],
    num_ranks: int,
    ranks: Literal["threads", "processes"] = "threads",
    args: Sequence[Any] = (),
    timeout: float | None = None,
    link_latency: float = 0.0,
    link_bandwidth: float = 0.0,
    faults: FaultInjector | None = None,
) -> list[Any]:
    """Calls ``fn(rank, num_ranks, *args)`` on every rank and returns the results, by rank.

    On GPUs, a rank that is a thread has a current stream of its own on the caller's current device;
    its work starts after what the caller has issued, and has finished when results are returned.

    Every rank computes with one thread: more would compete for the same cores. Ranks that are
    processes end with the process that started them, however that ends. They are spawned, and so
    are, by default, the workers of a ``DataLoader`` in them, which each import torch again: give it
    ``multiprocessing_context="fork"``.

    Ranks that are threads share torch's random number generator: ``torch.manual_seed`` on one of
    them disturbs the others, and the order of draws is not deterministic. Draw random numbers
    beforehand, or from a ``torch.Generator``.

    Args:
        fn: for processes, it must be importable: it is sent to them by name.
        num_ranks: the number of ranks.
        ranks: ``"threads"`` of this process, which exchange messages in memory, or
            ``"processes"``, whose default group uses torch's gloo backend.
        args: further arguments of ``fn``, the same on every rank.
        timeout: the limit for the whole run in seconds; ``None``: no limit. When it is exceeded,
            the Python stacks of each unfinished rank are printed to stderr, TimeoutError is raised,
            and ranks that are processes are killed.
        link_latency: threads only: seconds that every message is delayed.
        link_bandwidth: threads only: bytes per second of each channel; 0: unlimited.
        faults: threads only: ``faults(source, destination, kind, stage, microbatch)`` is called for
            every message sent; ``Fault.DROP`` loses it, ``Fault.FAIL`` breaks the link.

    Raises:
        Exception: the first error of a rank that does not just repeat another rank's.
        TimeoutError: a rank had not finished after ``timeout`` seconds, and none had failed.
        ValueError: an unknown kind of ranks, link options or faults for processes, or a function
            that is not defined in a file.
        TypeError: ``fn`` or ``args`` cannot be sent to processes.
    """
    if ranks == "threads":
        hubs = LoopbackHubs(num_ranks, link_latency, link_bandwidth, faults)
        return run_threads(fn, hubs, args, timeout)
    if ranks != "processes":
        raise ValueError(f"ranks={ranks!r}: choose 'threads' or 'processes'")
    if link_latency or link_bandwidth or faults:
        raise ValueError("link_latency, link_bandwidth and faults are for ranks='threads'")
    return run_processes(fn, num_ranks, args, timeout)
