"""Where a benchmark runs: on a GPU, or on the CPU to try it out without one.

Both have the same interface, so that a benchmark is written once. Numbers from the CPU mean
nothing.
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

from dualpipe_ext import _C, DualPipeConfig

TIMEOUT_S = 20.0  # of a pipeline: a hang becomes an error before the benchmark is killed
Mark = Any  # a point in the work of the calling thread's stream


class Place(ABC):
    """A device, the ways to send between ranks that share it, and its clock.

    Attributes:
        device: where stages and messages are.
        transports: what messages may travel over.
    """

    device: torch.device
    transports: tuple[str, ...]

    @abstractmethod
    def prepare(self) -> None:
        """Does now, in this process, what the first use would otherwise do in a step."""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Keeps the stream of the calling thread busy that long, using little of the device."""

    @abstractmethod
    def finish(self) -> None:
        """Waits until the calling thread's stream has finished all its work."""

    @abstractmethod
    def mark(self) -> Mark:
        """Marks this point in the work of the calling thread's stream."""

    @abstractmethod
    def seconds(self, start: Mark, end: Mark) -> float:
        """Returns the time between two marks that are past."""

    @abstractmethod
    def is_past(self, mark: Mark) -> bool:
        """Returns whether the stream has reached the mark."""

    @abstractmethod
    def hold(self, num_bytes: int) -> Tensor:
        """Allocates memory, as activations occupy it."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Forgets the peak so far."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Returns the most bytes that this process has held at once since ``reset_peak``."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Returns how many more bytes may be used."""

    def machine(self) -> dict[str, str]:
        """Names the device and the versions of what drives it."""
        return {"device": "none: tried out on the CPU"}

    def seconds_of(self, work: Callable[[], object]) -> float:
        """Returns how long the stream takes for what ``work`` issues."""
        start = self.mark()
        work()
        end = self.mark()
        self.finish()
        return self.seconds(start, end)


@final
class Cpu(Place):
    """The calling thread is its own stream: work is done when the call returns."""

    device = torch.device("cpu")
    transports = ("host",)

    def __init__(self) -> None:
        self._held = self._peak = 0

    def prepare(self) -> None:
        """Measures how late sleeps are."""
        oversleep()

    def sleep(self, seconds: float) -> None:
        """Sleeps."""
        host_sleep(seconds)

    def finish(self) -> None:
        """Does nothing: all work is done."""

    def mark(self) -> Mark:
        """Returns the time."""
        return time.perf_counter()

    def seconds(self, start: Mark, end: Mark) -> float:
        """Returns the difference of the times."""
        return float(end - start)

    def is_past(self, mark: Mark) -> bool:
        """Returns True."""
        return True

    def hold(self, num_bytes: int) -> Tensor:
        """Allocates memory, and counts it as long as the tensor lives."""
        held = torch.empty(num_bytes, dtype=torch.uint8)
        self._count(num_bytes)
        weakref.finalize(held, self._count, -num_bytes)
        return held

    def reset_peak(self) -> None:
        """Forgets the peak so far."""
        self._peak = self._held

    def peak_bytes(self) -> int:
        """Returns the most bytes that ``hold`` had handed out at once."""
        return self._peak

    def free_bytes(self) -> int:
        """Returns a gibibyte."""
        return 1 << 30

    def _count(self, num_bytes: int) -> None:
        self._held += num_bytes
        self._peak = max(self._peak, self._held)


@final
class Gpu(Place):
    """The current GPU. A sleep is a kernel of a single thread that watches the clock."""

    transports = tuple(os.environ.get("GPU_CHECK_TRANSPORTS", "copy nccl").split())

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.clock_hz = _clock_hz()  # sent to processes, which could not measure it side by side

    def prepare(self) -> None:
        """Starts CUDA."""
        torch.cuda.init()

    def sleep(self, seconds: float) -> None:
        """Launches a kernel of that length."""
        if seconds > 0:
            torch.cuda._sleep(round(seconds * self.clock_hz))

    def finish(self) -> None:
        """Waits for the current stream."""
        torch.cuda.current_stream().synchronize()

    def mark(self) -> Mark:
        """Records an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Returns the time between the events."""
        return float(start.elapsed_time(end)) * 1e-3

    def is_past(self, mark: Mark) -> bool:
        """Queries the event."""
        return bool(mark.query())

    def hold(self, num_bytes: int) -> Tensor:
        """Allocates memory from torch's allocator."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def reset_peak(self) -> None:
        """Resets the allocator's peak."""
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Returns the allocator's peak."""
        return torch.cuda.max_memory_allocated()

    def free_bytes(self) -> int:
        """Returns the device's free memory, after torch has released what it caches."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def machine(self) -> dict[str, str]:
        """Names the GPU and the versions."""
        return {
            "device": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "nccl": _C.nccl_version(),  # type: ignore[attr-defined] # in builds with CUDA
        }


def place_of(device: str) -> Place:
    """Returns the place that ``--device`` names.

    Raises:
        ValueError: ``device`` is neither ``cuda`` nor ``cpu``.
    """
    places: dict[str, Callable[[], Place]] = {"cuda": Gpu, "cpu": Cpu}
    if device not in places:
        raise ValueError(f"--device {device}: choose cuda, or cpu to try the benchmark out")
    return places[device]()


def engine_config(transport: str, **more: Any) -> DualPipeConfig:
    """Returns settings of our engine for messages over ``transport``."""
    settings: dict[str, Any] = {"transport": transport, "timeout": TIMEOUT_S, **more}
    return DualPipeConfig(**settings)


def _clock_hz() -> float:
    """Returns the cycles per second that ``torch.cuda._sleep`` counts, on a busy device."""
    torch.cuda._sleep(1_000_000_000)  # half a second: an idle GPU has a lower clock
    return slope([(cycles, _slept_seconds(cycles)) for cycles in (2_000_000, 10_000_000)])


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Returns the change of the first value over that of the second, from first to last point.

    What is the same in every measurement, such as the launch of a kernel, cancels out.
    """
    (x0, y0), (x1, y1) = points[0], points[-1]
    return (x1 - x0) / (y1 - y0)


def _slept_seconds(cycles: int, tries: int = 9) -> float:
    """Returns the median time of a sleep of ``cycles`` cycles."""
    marks = []
    for _ in range(tries):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "01")
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        marks.append((start, end))
    torch.cuda.current_stream().synchronize()
    return statistics.median(float(start.elapsed_time(end)) * 1e-3 for start, end in marks)
