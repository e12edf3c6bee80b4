"""Copies within the device, to it and from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simulated_gpu.memory import Memory
from simulated_gpu.streams import Streams

__all__ = ["Copy"]


class Copy:
    """``copy_``."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def __call__(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Issue the copy; between device and host, wait for it unless told otherwise."""
        if source.device.type == "meta" or to.numel() == 0:
            return to
        there, here = (_end(x) for x in (to, source))

        def work() -> None:
            there().copy_(here())

        self._streams.put(work)
        if not non_blocking and not (to.is_cuda and source.is_cuda):
            torch.cuda.current_stream().synchronize()
        return to


def _end(x: Tensor) -> Callable[[], Tensor]:
    return Memory.of(x).tensor if x.is_cuda else lambda: x
