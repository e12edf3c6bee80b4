"""Python functions as work of CUDA streams."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import traceback
from collections.abc import Callable

import torch

__all__ = ["Streams", "is_there"]


def is_there() -> bool:
    """Whether this process has the simulated GPU."""
    return hasattr(ctypes.CDLL(None), "simulated_gpu_launch")


class Streams:
    """Puts Python functions into CUDA streams."""

    def __init__(self) -> None:
        # PyDLL keeps Python's lock: letting go of it would have the work's thread take it at once.
        self._launch = ctypes.PyDLL(None).simulated_gpu_launch
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
        self._launch.restype = None
        self._entry = ctypes.CFUNCTYPE(None, ctypes.c_long)(self._run)
        self._works: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()

    def put(self, work: Callable[[], None]) -> None:
        """Issue it on the current stream."""
        number = next(self._numbers)
        self._works[number] = work
        stream = torch.cuda.current_stream().cuda_stream
        self._launch(stream, ctypes.cast(self._entry, ctypes.c_void_p), number)

    def _run(self, number: int) -> None:
        try:
            with torch.no_grad():
                self._works.pop(number)()
        except BaseException:  # noqa: BLE001 - a thread of the device has nobody to tell
            traceback.print_exc(file=sys.__stderr__)
            os._exit(70)
