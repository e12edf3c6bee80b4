"""The questions of gpu_probe.py: functions that yield cases, each with what finds the answer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from cuda_calls import (
    RegisteredPage,
    copy_beside_computation,
    new_stream,
    priorities,
    wait_for_value,
)
from probe_waits import CALLS, PATIENCE_S, Case, Work, meanwhile, meanwhile_opening
from torch import Tensor

NUM_OTHERS = 31  # with the one that waits, as many streams as hardware queues
SIZES = {"4 KiB": 4 << 10, "1 MiB": 1 << 20, "16 MiB": 16 << 20, "64 MiB": 64 << 20}

Copy = Callable[[Tensor, Tensor], object]  # to, from


@dataclass(frozen=True)
class Question:
    """What is asked in one process.

    Attributes:
        name: its name in the table.
        cases: yields the name of each case, and what finds the answer.
        limit_s: the time limit for all cases, once CUDA has started.
        environment: variables to set before that.
        starts_cuda: whether CUDA is started before the first case.
    """

    name: str
    cases: Callable[[], Iterator[Case]]
    limit_s: float = 5.0
    environment: Mapping[str, str] = field(default_factory=lambda: {"CUDA_MODULE_LOADING": "LAZY"})
    starts_cuda: bool = True


def shared_queues() -> Iterator[Case]:
    """One stream waits: which of 31 others of each priority proceed?"""
    torch.cuda._sleep(1)  # loads the kernel, which must not happen later
    torch.cuda.synchronize()
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
    torch.cuda.synchronize()  # before the flag is freed
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
    """Which settings apply to all of this?"""
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_MODULE_LOADING"):
        yield name, partial(lambda name: os.environ.get(name, "not set"), name)


QUESTIONS = [
    Question("settings", settings),
    Question("start", import_of_torch, 25.0, starts_cuda=False),
    Question("start, LAZY", start_up, 25.0, starts_cuda=False),
    Question("start, EAGER", start_up, 25.0, {"CUDA_MODULE_LOADING": "EAGER"}, starts_cuda=False),
    *(
        Question(f"a stream waits, {text}", partial(meanwhile, what))
        for text, what in CALLS.items()
    ),
    Question(
        "a stream waits, cudaIpcOpenMemHandle is called",
        meanwhile_opening,
        20.0,
        starts_cuda=False,
    ),
    Question("hardware queues", shared_queues),
    Question("rates within the GPU", copy_rates, 10.0),
]
