"""What the ranks of the tests of mirrors on a GPU run: a stage is summed while another is computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from gpu_ranks import DEVICE, ON_CPU, finish, over
from torch import Tensor, nn

from dualpipe_ext import DualPipe, DualPipeConfig

ROWS, NUM_CHUNKS, WIDTH = 3, 8, 32


class LastBackward(nn.Module):
    """Calls something in the last of so many backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_left = 0
        self.call: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        y = x.view_as(x)
        y.register_hook(self._count)
        return y

    def _count(self, _: Tensor) -> None:
        self.num_left -= 1
        if self.num_left == 0:
            self.call()


class Mirrored:
    """Two stages of layers that are the identity: each row gives each of them a gradient of ones.

    The lower stage is computed when the upper one is done already.
    """

    def __init__(self, rank: int, transport: str) -> None:
        self.layers = [nn.Linear(WIDTH, WIDTH, bias=False, device=DEVICE) for _ in range(8)]
        for layer in self.layers:
            nn.init.eye_(layer.weight)
        self.last = LastBackward()
        lower = nn.Sequential(self.layers[0], self.last, self.layers[1])
        upper = nn.Sequential(*self.layers[2:])
        self.pipeline = DualPipe(
            [lower, upper] if rank == 0 else [upper, lower],
            config=DualPipeConfig(**over(transport), bucket_bytes=1),  # a bucket is a layer
        )
        self.inputs = torch.ones(ROWS * NUM_CHUNKS // 2, WIDTH, device=DEVICE, requires_grad=True)
        self.beside: AbstractContextManager[object] = nullcontext()
        if not ON_CPU:
            # Of a priority, and so of hardware queues, that computation and sums have not.
            self.beside = torch.cuda.stream(torch.cuda.Stream(priority=-1))

    def step(self) -> None:
        for layer in self.layers:
            layer.weight.grad = None
        self.last.num_left = NUM_CHUNKS // 2
        self.pipeline.step(
            self.inputs,
            num_chunks=NUM_CHUNKS,
            criterion=lambda y, _: y.sum(),
            labels=[self.inputs],
            sync_gradients=True,
        )

    def warm_up(self) -> None:
        """Does each thing once: what a GPU does for the first time may wait for all that it is at."""
        self.step()  # tells the shapes, too
        finish()
        self.is_summed()
        if not ON_CPU:
            torch.cuda._sleep(1000)
            finish()

    def is_summed(self) -> bool:
        """Whether the upper stage has the gradients of both copies; asks no stream that computes."""
        with self.beside:
            return all_summed(self.layers[2:])

    def is_summed_while(self, is_busy: Callable[[], bool]) -> bool:
        while is_busy():
            if self.is_summed():
                return is_busy()
        return False


def all_summed(layers: list[nn.Linear]) -> bool:
    """Whether they have the gradients of both copies, asked on the current stream."""
    grads = [layer.weight.grad for layer in layers]
    return all(g is not None and bool((g == ROWS * NUM_CHUNKS).all()) for g in grads)


def summed_while_the_host_is_busy(rank: int, num_ranks: int, transport: str) -> bool:
    mirrored = Mirrored(rank, transport)
    mirrored.warm_up()
    found = []

    def look() -> None:
        deadline = time.monotonic() + 10
        found.append(mirrored.is_summed_while(lambda: time.monotonic() < deadline))

    mirrored.last.call = look
    mirrored.step()
    return found == [True] and all_summed(mirrored.layers)


def summed_while_the_device_is_busy(rank: int, num_ranks: int, transport: str) -> bool:
    mirrored = Mirrored(rank, transport)
    mirrored.warm_up()
    slept = torch.cuda.Event()

    def sleep() -> None:
        torch.cuda._sleep(3_000_000_000)  # above a second
        slept.record()

    mirrored.last.call = sleep
    mirrored.step()
    found = mirrored.is_summed_while(lambda: not slept.query())
    return found and all_summed(mirrored.layers)
