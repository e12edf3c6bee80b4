"""What gpu_probe.py asks: one function a question; each yields its cases and what finds the answer."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from cuda_calls import (
    RegisteredPage,
    call,
    copy_beside_computation,
    new_stream,
    priorities,
    wait_for_value,
)
from torch import Tensor

PATIENCE_S = 0.2  # what takes longer blocks
NUM_OTHERS = 31  # with the one that waits, as many streams as there are hardware queues
SIZES = {"4 KiB": 4 << 10, "1 MiB": 1 << 20, "16 MiB": 16 << 20, "64 MiB": 64 << 20}

Case = tuple[str, Callable[[], str]]
Work = Callable[[], object]
Copy = Callable[[Tensor, Tensor], object]  # to, from


@dataclass(frozen=True)
class Question:
    """What is asked in one process.

    Attributes:
        name: What the table calls it.
        cases: Yields the name of each case, and what finds the answer.
        limit_s: For all cases, once CUDA has started.
        environment: What is set before it does.
        starts_cuda: CUDA starts before the first case.
    """

    name: str
    cases: Callable[[], Iterator[Case]]
    limit_s: float = 5.0
    environment: Mapping[str, str] = field(default_factory=lambda: {"CUDA_MODULE_LOADING": "LAZY"})
    starts_cuda: bool = True


class Caller:
    """A thread that does one thing."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._answer = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        start = time.perf_counter()
        try:
            self._work()
            self._answer = f"returns after {(time.perf_counter() - start) * 1e6:.0f} us"
        except Exception as error:  # noqa: BLE001 - is the answer
            self._answer = f"unknown: {error}"

    def answer(self) -> str:
        """Return whether it returns soon."""
        self._thread.join(PATIENCE_S)
        return "blocks" if self._thread.is_alive() else self._answer

    def end(self) -> None:
        """Wait until it has returned."""
        self._thread.join()


class Scene:
    """A stream that waits for a word of host memory, as for a message, and another one that is idle."""

    def __init__(self) -> None:
        self._flag = RegisteredPage()
        self.waiting, self.idle = torch.cuda.Stream(), torch.cuda.Stream()
        self.result = torch.ones(1024, device="cuda")  # of what waits
        self.source, self.target = (torch.ones(1 << 20, device="cuda") for _ in "01")
        self.event = torch.cuda.Event()
        for work in (*self.calls().values(), self.read_back):  # at first they may do something more
            work()
        torch.cuda.synchronize()

    def calls(self) -> dict[str, Work]:
        """Return what another thread may want meanwhile: none of it has to wait for the stream."""
        return {
            "cudaEventQuery": self.event.query,
            "launch of a kernel": partial(self.on_idle, lambda: torch.cuda._sleep(1000)),
            "cudaMemcpyAsync": partial(self.on_idle, lambda: self.target.copy_(self.source)),
            "cudaMemcpyBatchAsync": partial(
                self.on_idle, lambda: copy_beside_computation(self.target, self.source)
            ),
        }

    def on_idle(self, work: Work) -> None:
        """Do it on the idle stream."""
        with torch.cuda.stream(self.idle):
            work()

    def read_back(self) -> None:
        """Copy from the stream that waits to pageable memory of the host."""
        with torch.cuda.stream(self.waiting):
            self.result.cpu()

    def hold(self) -> None:
        """Have the stream wait."""
        wait_for_value(self.waiting, self._flag.address, 1)
        with torch.cuda.stream(self.waiting):
            torch.cuda._sleep(1000)
            self.event.record()

    def let_go(self) -> None:
        """End its wait."""
        self._flag.word.value = 1


def meanwhile(prepare: Callable[[Scene], Work]) -> Iterator[Case]:
    """While a stream waits: does this call return, and does another of another thread meanwhile?"""

    def find(name: str) -> str:
        scene = Scene()
        first = prepare(scene)
        scene.hold()
        callers = [Caller(first)]
        try:
            returns = callers[0].answer()
            callers.append(Caller(scene.calls()[name]))
            return f"it {returns}; the other {callers[1].answer()}"
        finally:
            scene.let_go()
            for caller in callers:
                caller.end()
            torch.cuda.synchronize()

    for name in ("cudaEventQuery", "launch of a kernel", "cudaMemcpyAsync", "cudaMemcpyBatchAsync"):
        yield f"the other is {name}", partial(find, name)


def nothing(scene: Scene) -> Work:
    """Return what does nothing: what the waiting stream does to others by itself."""
    return lambda: None


def read_back(scene: Scene) -> Work:
    """Return ``Tensor.cpu()`` of what the waiting stream computes."""
    return scene.read_back


def free_memory(scene: Scene) -> Work:
    """Return ``cudaFree`` of memory that nobody uses."""
    memory = ctypes.c_void_p()
    call("cudaMalloc", ctypes.byref(memory), ctypes.c_size_t(1 << 20))
    return lambda: call("cudaFree", memory)


def allocate_memory(scene: Scene) -> Work:
    """Return ``cudaMalloc``."""
    memory = ctypes.c_void_p()
    return lambda: call("cudaMalloc", ctypes.byref(memory), ctypes.c_size_t(1 << 20))


def allocate_host_memory(scene: Scene) -> Work:
    """Return ``cudaHostAlloc``."""
    memory = ctypes.c_void_p()
    return lambda: call("cudaHostAlloc", ctypes.byref(memory), ctypes.c_size_t(1 << 20), 0)


def unregister_host_memory(scene: Scene) -> Work:
    """Return ``cudaHostUnregister``, as the link of copy engines calls it at its end."""
    return RegisteredPage().unregister


# Of torch's own library, each in a module of its own; none is compiled when it is first used.
_NEW_KERNELS = iter([torch.atan, torch.sinh, torch.log2, torch.trunc])


def load_kernel(scene: Scene) -> Work:
    """Return the first launch of a kernel, which loads it."""
    kernel: Callable[..., Tensor] = next(_NEW_KERNELS)
    return partial(scene.on_idle, lambda: kernel(scene.source, out=scene.target))


def shared_queues() -> Iterator[Case]:
    """One stream waits; which of 31 others of each priority go on?"""
    lowest, highest = priorities()
    kinds = list(dict.fromkeys((lowest, -1, highest)))
    for waiting in kinds:
        streams = {kind: [new_stream(kind) for _ in range(NUM_OTHERS)] for kind in kinds}
        yield (
            f"one of priority {waiting} waits",
            partial(_which_go_on, new_stream(waiting), streams),
        )


def _which_go_on(waiting: torch.cuda.Stream, others: dict[int, list[torch.cuda.Stream]]) -> str:
    flag = RegisteredPage()
    wait_for_value(waiting, flag.address, 1)
    for stream in (each for streams in others.values() for each in streams):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1000)
    time.sleep(PATIENCE_S)
    stuck = {kind: [i for i, s in enumerate(v) if not s.query()] for kind, v in others.items()}
    flag.word.value = 1
    torch.cuda.synchronize()  # before the flag goes
    return "; ".join(
        f"{NUM_OTHERS - len(numbers)} of {NUM_OTHERS} of priority {kind} go on"
        + (f", not {numbers}" if numbers else "")
        for kind, numbers in stuck.items()
    )


def copy_rates() -> Iterator[Case]:
    """How fast do a copy engine and a raw copy move memory within the GPU?"""
    ways: dict[str, Copy] = {"copy engine": copy_beside_computation, "copy_": Tensor.copy_}
    for size, num_bytes in SIZES.items():
        for num_streams in (1, 4):
            for name, copy in ways.items():
                case = f"{name}, {size}, streams: {num_streams}"
                yield case, partial(_rate, copy, num_bytes, num_streams)


def _rate(copy: Copy, num_bytes: int, num_streams: int) -> str:
    count = max(4, min(64, (128 << 20) // num_bytes))
    streams = [torch.cuda.Stream() for _ in range(num_streams)]
    pairs = [torch.ones(2, num_bytes // 4, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for _ in "01":  # the first time is not counted
        start, ends = torch.cuda.Event(enable_timing=True), []
        torch.cuda._sleep(20_000_000)  # until all is issued
        start.record()
        for stream, (to, source) in zip(streams, pairs, strict=True):
            stream.wait_event(start)
            with torch.cuda.stream(stream):
                for _ in range(count):
                    copy(to, source)
                ends.append(torch.cuda.Event(enable_timing=True))
                ends[-1].record()
        torch.cuda.synchronize()
    seconds = max(start.elapsed_time(end) for end in ends) * 1e-3
    return f"{num_bytes * count * num_streams / seconds * 1e-9:.1f} GB/s"


def import_of_torch() -> Iterator[Case]:
    """How long does a process take to import torch?"""
    command = [sys.executable, "-c", "import torch"]
    yield "import torch", partial(_seconds, lambda: subprocess.run(command, check=True))


def start_up() -> Iterator[Case]:
    """How long does CUDA take to start, and its first kernels?"""
    work = lambda: torch.ones(2, device="cuda").sum().item()
    yield "CUDA and its first kernels", partial(_seconds, work)


def _seconds(work: Work) -> str:
    start = time.perf_counter()
    work()
    return f"{time.perf_counter() - start:.2f} s"


def settings() -> Iterator[Case]:
    """Which settings hold for all of this?"""
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_MODULE_LOADING"):
        yield name, partial(lambda name: os.environ.get(name, "not set"), name)


WAITING = "a stream waits and "
QUESTIONS = [
    Question("settings", settings),
    Question("start", import_of_torch, 25.0, starts_cuda=False),
    Question("start, LAZY", start_up, 25.0, starts_cuda=False),
    Question("start, EAGER", start_up, 25.0, {"CUDA_MODULE_LOADING": "EAGER"}, starts_cuda=False),
    Question(WAITING + "nothing is called", partial(meanwhile, nothing)),
    Question(WAITING + "Tensor.cpu() waits for it", partial(meanwhile, read_back)),
    Question(WAITING + "a kernel is loaded", partial(meanwhile, load_kernel)),
    Question(WAITING + "cudaFree is called", partial(meanwhile, free_memory)),
    Question(WAITING + "cudaMalloc is called", partial(meanwhile, allocate_memory)),
    Question(WAITING + "cudaHostUnregister is called", partial(meanwhile, unregister_host_memory)),
    Question(WAITING + "cudaHostAlloc is called", partial(meanwhile, allocate_host_memory)),
    Question("hardware queues", shared_queues),
    Question("rates within the GPU", copy_rates, 10.0),
]
