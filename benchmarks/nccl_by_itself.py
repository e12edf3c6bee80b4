"""NCCL's own point-to-point calls, from the library that torch has loaded, with nothing between."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

UINT8 = 1  # ncclUint8


class UniqueId(ctypes.Structure):
    """An ``ncclUniqueId``."""

    _fields_ = [("internal", ctypes.c_ubyte * 128)]


class NcclPair:
    """Two ranks, which are threads of this process and share a GPU and a communicator.

    Needs NCCL 2.30 and ``NCCL_MULTI_RANK_GPU_ENABLE=1``.
    """

    def __init__(self) -> None:
        program = ctypes.CDLL(None)  # finds what is preloaded first, as torch's own calls do
        self.library = program if hasattr(program, "ncclSend") else ctypes.CDLL("libnccl.so.2")
        self.library.ncclGetErrorString.restype = ctypes.c_char_p
        self._id = UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(self._id))

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function of NCCL.

        Raises:
            RuntimeError: the call fails.
        """
        result = getattr(self.library, name)(*arguments)
        if result != 0:
            text = self.library.ncclGetErrorString(result).decode()
            raise RuntimeError(f"{name}: {text}; NCCL_DEBUG=WARN tells more")

    @contextmanager
    def end(self, rank: int) -> Iterator[NcclEnd]:
        """Connects this thread's end; both threads must do so."""
        communicator = ctypes.c_void_p()
        self.call("ncclCommInitRank", ctypes.byref(communicator), 2, self._id, rank)
        yield NcclEnd(self, communicator, rank)
        torch.cuda.current_stream().synchronize()
        self.call("ncclCommDestroy", communicator)


class NcclEnd:
    """One rank's end: rank 0 sends, rank 1 receives, on the current stream."""

    def __init__(self, pair: NcclPair, communicator: ctypes.c_void_p, rank: int) -> None:
        self._pair = pair
        self._communicator = communicator
        self._rank = rank

    def transfer(self, tensor: Tensor) -> None:
        """Sends ``tensor`` to the other rank, or receives it."""
        self._pair.call(
            "ncclRecv" if self._rank else "ncclSend",
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_size_t(tensor.nbytes),
            UINT8,
            1 - self._rank,
            self._communicator,
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
