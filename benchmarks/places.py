"""Where a benchmark runs: on a GPU, or on the CPU to try without one all that it does.

Both have the same interface, so that a benchmark is written once. Numbers of the CPU mean nothing.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from sleeping import host_sleep, oversleep
from torch import Tensor

from dualpipe_ext import DualPipeConfig

TIMEOUT_S = 20.0  # of a pipeline: what hangs has become an error before the benchmark is ended
Mark = Any  # a point in the work of the calling thread's stream


class Place(ABC):
    """A device, the ways to send between ranks that share it, and its clock.

    Attributes:
        device: Where stages and messages are.
        transports: What messages may travel over.
    """

    device: torch.device
    transports: tuple[str, ...]

    @abstractmethod
    def prepare(self) -> None:
        """Do now, in this process, what the first use would otherwise do within a step."""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Keep the calling thread's stream busy so long, on as little of the device as can be."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until the calling thread's stream is through with all it was given."""

    @abstractmethod
    def mark(self) -> Mark:
        """Return this point in the work of the calling thread's stream."""

    @abstractmethod
    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the time between two marks that are past."""

    @abstractmethod
    def is_past(self, mark: Mark) -> bool:
        """Return whether the stream has come to the mark."""

    @abstractmethod
    def hold(self, num_bytes: int) -> Tensor:
        """Return memory, as an activation occupies it."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Forget the peak so far."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Return the most memory held at once by this process since ``reset_peak``."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return how much more memory may be used."""

    def machine(self) -> dict[str, str]:
        """Name the device and the versions of what drives it."""
        return {"device": "none: tried out on the CPU"}

    def seconds_of(self, work: Callable[[], object]) -> float:
        """Return how long the stream takes for what ``work`` gives it."""
        start = self.mark()
        work()
        end = self.mark()
        self.finish()
        return self.seconds(start, end)


@final
class Cpu(Place):
    """The calling thread is its own stream: what it was given is done when the call returns."""

    device = torch.device("cpu")
    transports = ("host",)

    def __init__(self) -> None:
        self._held = self._peak = 0

    def prepare(self) -> None:
        """Measure how late sleeps are."""
        oversleep()

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        host_sleep(seconds)

    def finish(self) -> None:
        """Return: nothing is left to do."""

    def mark(self) -> Mark:
        """Return the time."""
        return time.perf_counter()

    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the difference."""
        return float(end - start)

    def is_past(self, mark: Mark) -> bool:
        """Return True."""
        return True

    def hold(self, num_bytes: int) -> Tensor:
        """Return memory, and count it as long as the tensor lives."""
        held = torch.empty(num_bytes, dtype=torch.uint8)
        self._count(num_bytes)
        weakref.finalize(held, self._count, -num_bytes)
        return held

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self._peak = self._held

    def peak_bytes(self) -> int:
        """Return the most that ``hold`` had given out at once."""
        return self._peak

    def free_bytes(self) -> int:
        """Return a gibibyte."""
        return 1 << 30

    def _count(self, num_bytes: int) -> None:
        self._held += num_bytes
        self._peak = max(self._peak, self._held)


@final
class Gpu(Place):
    """The current GPU. A sleep is one block of one thread that watches the clock."""

    transports = tuple(os.environ.get("GPU_CHECK_TRANSPORTS", "copy nccl").split())

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.clock_hz = _clock_hz()  # travels to processes: together they could not measure it

    def prepare(self) -> None:
        """Start CUDA."""
        torch.cuda.init()

    def sleep(self, seconds: float) -> None:
        """Launch a kernel of that length."""
        if seconds > 0:
            torch.cuda._sleep(round(seconds * self.clock_hz))

    def finish(self) -> None:
        """Wait for the current stream."""
        torch.cuda.current_stream().synchronize()

    def mark(self) -> Mark:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the time between the events."""
        return float(start.elapsed_time(end)) * 1e-3

    def is_past(self, mark: Mark) -> bool:
        """Ask the event."""
        return bool(mark.query())

    def hold(self, num_bytes: int) -> Tensor:
        """Return memory from torch's allocator."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def reset_peak(self) -> None:
        """Reset the allocator's peak."""
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Return the allocator's peak."""
        return torch.cuda.max_memory_allocated()

    def free_bytes(self) -> int:
        """Return what the device has free, once torch has given back what it keeps for later."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def machine(self) -> dict[str, str]:
        """Name the GPU and the versions."""
        return {
            "device": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }


def place_of(device: str) -> Place:
    """Return the place that ``--device`` names.

    Raises:
        ValueError: It is neither ``cuda`` nor ``cpu``.
    """
    places: dict[str, Callable[[], Place]] = {"cuda": Gpu, "cpu": Cpu}
    if device not in places:
        raise ValueError(f"--device {device}: choose cuda, or cpu to try the benchmark out")
    return places[device]()


def engine_config(transport: str, **more: Any) -> DualPipeConfig:
    """Return settings of our engine for messages over ``transport``."""
    settings: dict[str, Any] = {"transport": transport, "timeout": TIMEOUT_S, **more}
    return DualPipeConfig(**settings)


def _clock_hz() -> float:
    """Return the cycles a second that ``torch.cuda._sleep`` counts, measured on a device at work."""
    torch.cuda._sleep(1_000_000_000)  # half a second: an idle GPU has a lower clock
    return slope([(cycles, _slept_seconds(cycles)) for cycles in (2_000_000, 10_000_000)])


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the change of the first value by that of the second, between first and last point.

    What every measurement adds alike, such as the launch of a kernel, drops out.
    """
    (x0, y0), (x1, y1) = points[0], points[-1]
    return (x1 - x0) / (y1 - y0)


def _slept_seconds(cycles: int, tries: int = 9) -> float:
    """Return how long a sleep of so many cycles takes, the median of a few."""
    marks = []
    for _ in range(tries):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "01")
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        marks.append((start, end))
    torch.cuda.current_stream().synchronize()
    return statistics.median(float(start.elapsed_time(end)) * 1e-3 for start, end in marks)
