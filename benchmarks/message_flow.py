"""How fast messages flow from one rank to another, by the clock of the device.

The sender's stream is kept busy until both hosts have issued everything. The time after that, from
the arrival of the first message to that of the last, is the device's own; except that over ``copy``
a thread of the sender issues each message once it sees that the receiver has asked for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cuda_calls import copy_beside_computation
from nccl_by_itself import NcclPair
from places import Mark, Place, engine_config
from thread_ranks import StartLine, in_threads
from torch import Tensor, nn

from dualpipe_ext import Pipeline

HEAD_START_S = 0.05  # of the hosts; each step checks that it was enough


@dataclass(frozen=True)
class Flow:
    """Messages to be sent one after the other.

    Attributes:
        place: where to run.
        transport: what messages travel over.
        num_bytes: the size of each.
        num_messages: how many there are.
        repeats: how often to measure.
        max_ctas: the most thread blocks that NCCL may use; 0: NCCL decides.
    """

    place: Place
    transport: str
    num_bytes: int
    num_messages: int = 24
    repeats: int = 5
    max_ctas: int = 0

    def batch(self) -> Tensor:
        """Returns the messages, each in memory of its own."""
        return torch.ones(self.num_messages, self.num_bytes // 4, device=self.place.device)


class Source(nn.Module):
    """Keeps the stream busy for the head start, and returns its input."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device=place.device))
        self.place = place
        self.head_start_s = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x``."""
        self.place.sleep(self.head_start_s)
        self.head_start_s = 0.0
        return x


class Sink(nn.Module):
    """Marks the arrival of each message."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device=place.device))
        self.place = place
        self.arrivals: list[Mark] = []

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x``."""
        self.arrivals.append(self.place.mark())
        return x


def engine_rank(rank: int, num_ranks: int, start_line: StartLine, flow: Flow) -> list[float]:
    """Sends (rank 0) or receives through our engine; returns seconds per message of each repeat."""
    place = flow.place
    source, sink = Source(place), Sink(place)
    config = engine_config(flow.transport, nccl_max_ctas=flow.max_ctas)
    pipeline = Pipeline([sink if rank else source], "gpipe", config=config)
    batch = flow.batch() if rank == 0 else None

    def step() -> None:
        with torch.no_grad():
            pipeline.step(batch, num_chunks=flow.num_messages)

    step()  # describes the messages
    taken = []
    for _ in range(flow.repeats):
        source.head_start_s = HEAD_START_S
        sink.arrivals.clear()
        taken.append(one_flow(start_line, flow, step, sink.arrivals))
    return taken


def one_flow(
    start_line: StartLine, flow: Flow, issue: Callable[[], object], arrivals: list[Mark]
) -> float:
    """Issues one flow on this rank; returns the seconds per message, 0 if none arrive here.

    Raises:
        RuntimeError: the hosts took longer than their head start.
    """
    place = flow.place
    place.finish()
    start_line.wait()
    issue()
    start_line.wait()
    if place.device.type == "cuda" and arrivals and place.is_past(arrivals[0]):
        raise RuntimeError(
            f"issuing {flow.num_messages} messages took longer than {HEAD_START_S} s: "
            f"lengthen HEAD_START_S"
        )
    place.finish()
    if not arrivals:
        return 0.0
    return place.seconds(arrivals[0], arrivals[-1]) / (len(arrivals) - 1)


def nccl_rank(
    rank: int, num_ranks: int, start_line: StartLine, flow: Flow, pair: NcclPair
) -> list[float]:
    """Does the same with NCCL's own ncclSend and ncclRecv."""
    place = flow.place
    batch = flow.batch()
    arrivals: list[Mark] = []
    with pair.end(rank) as end:
        end.transfer(batch[0])  # connects, which takes longer than the head start
        place.finish()

        def issue() -> None:
            arrivals.clear()
            if rank == 0:
                place.sleep(HEAD_START_S)
            for message in batch:
                end.transfer(message)
                if rank == 1:
                    arrivals.append(place.mark())

        return [one_flow(start_line, flow, issue, arrivals) for _ in range(flow.repeats)]


def raw_seconds(flow: Flow, copy: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> float:
    """Returns the seconds that ``copy`` takes per message, copy after copy."""
    place, batch = flow.place, flow.batch()
    targets = [torch.empty_like(batch[0]) for _ in range(3)]
    taken = []
    for _ in range(flow.repeats + 1):
        place.sleep(HEAD_START_S / 10)
        copy(targets[-1], batch[-1])
        start = place.mark()
        for i in range(flow.num_messages):
            copy(targets[i % 3], batch[i])
        end = place.mark()
        place.finish()
        taken.append(place.seconds(start, end) / flow.num_messages)
    return statistics.median(taken[1:])


def copy_engine_seconds(flow: Flow) -> float:
    """Returns the seconds that a copy engine takes per message, copy after copy."""
    with torch.cuda.stream(torch.cuda.Stream()):  # the default one refuses such copies
        return raw_seconds(flow, copy_beside_computation)


def engine_seconds(flow: Flow) -> float:
    """Returns the median seconds per message through our engine."""
    return float(statistics.median(in_threads(engine_rank, 2, flow)[1]))


def nccl_seconds(flow: Flow) -> float:
    """Returns the median seconds per message through NCCL itself."""
    return float(statistics.median(in_threads(nccl_rank, 2, flow, NcclPair())[1]))
