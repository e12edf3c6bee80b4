"""A process that lends memory of its GPU to the one that has started it."""

from __future__ import annotations

import ctypes
import multiprocessing
from multiprocessing.connection import Connection

import torch
from cuda_calls import MemoryHandle, call

MEMORY_BYTES = 4 << 20  # more than a block from which small allocations are cut
PATIENCE_S = 30.0


class MemoryLender:
    """Forks the process, which starts CUDA; so CUDA must not have been started here.

    It ends with this process.
    """

    def __init__(self) -> None:
        fork = multiprocessing.get_context("fork")
        self._pipe, theirs = fork.Pipe()
        fork.Process(target=_lend, args=(theirs, self._pipe), daemon=True).start()
        theirs.close()

    def handle(self) -> MemoryHandle:
        """Returns the handle of memory of the other process, new each time.

        Raises:
            RuntimeError: the process does not answer.
        """
        self._pipe.send("")
        if not self._pipe.poll(PATIENCE_S):
            raise RuntimeError("the process that lends memory does not answer")
        return MemoryHandle.from_buffer_copy(self._pipe.recv_bytes())


def _lend(pipe: Connection, others_end: Connection) -> None:
    others_end.close()  # so that the pipe ends with the other process
    torch.cuda.synchronize()
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        memory, handle = ctypes.c_void_p(), MemoryHandle()
        call("cudaMalloc", ctypes.byref(memory), ctypes.c_size_t(MEMORY_BYTES))
        call("cudaIpcGetMemHandle", ctypes.byref(handle), memory)
        pipe.send_bytes(bytes(handle))
