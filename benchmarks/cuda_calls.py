"""CUDA calls that torch has no functions for, from the libraries that torch has loaded."""

from __future__ import annotations

import ctypes
import functools
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DRIVER_VERSION = 12000  # of the interface to use, as in csrc/device/cuda_current.cpp
NON_BLOCKING = 1  # cudaStreamNonBlocking
PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegisterPortable, cudaHostRegisterMapped
WAIT_VALUE_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ
ACCESS_ORDER_STREAM = 1  # cudaMemcpySrcAccessOrderStream
NOT_READY = 600  # cudaErrorNotReady
PREFER_OVERLAP = 1  # cudaMemcpyFlagPreferOverlapWithCompute


class MissingCallError(RuntimeError):
    """The libraries that torch has loaded have no such call."""


@functools.cache
def runtime() -> ctypes.CDLL:
    """Returns the CUDA runtime that torch calls: one that is linked or preloaded comes first.

    Raises:
        MissingCallError: there is none.
    """
    program = ctypes.CDLL(None)
    if hasattr(program, "cudaStreamQuery"):
        return program
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "/libcudart" in path:
            return ctypes.CDLL(path)
    raise MissingCallError("no such library: libcudart")


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the runtime.

    Raises:
        MissingCallError: the runtime has no function of that name.
        RuntimeError: the call fails.
    """
    function = getattr(runtime(), name, None)
    if function is None:
        raise MissingCallError(f"no such call: {name}")
    error = function(*arguments)
    if error:
        runtime().cudaGetLastError()  # clears it; torch would take it for its own
        raise RuntimeError(f"{name}: error {error} of CUDA")


def query_event(event: torch.cuda.Event) -> None:
    """Queries whether the device is past the event; unlike torch's query, it releases the GIL.

    Raises:
        RuntimeError: the call fails.
    """
    error = runtime().cudaEventQuery(ctypes.c_void_p(event.cuda_event))
    if error not in (0, NOT_READY):
        raise RuntimeError(f"cudaEventQuery: error {error} of CUDA")
    runtime().cudaGetLastError()  # clears it: "not ready" is not an error


def wait_for_value(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Makes the stream wait until the word at ``address`` is at least ``value``.

    Calls cuStreamWaitValue32.

    Raises:
        MissingCallError: the driver does not have that call.
        RuntimeError: the call fails.
    """
    wait = _driver_call("cuStreamWaitValue32")
    error = wait(stream.cuda_stream, address, value, WAIT_VALUE_GEQ)
    if error:
        raise RuntimeError(f"cuStreamWaitValue32: error {error} of the driver")


@functools.cache
def _driver_call(name: str) -> Any:
    found = ctypes.c_void_p()
    version, flags = ctypes.c_uint(DRIVER_VERSION), ctypes.c_ulonglong(0)
    state = ctypes.c_int()
    text, there, why = name.encode(), ctypes.byref(found), ctypes.byref(state)
    call("cudaGetDriverEntryPointByVersion", text, there, version, flags, why)
    if not found.value:
        raise MissingCallError(f"no such call: {name}")
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint
    )
    return kind(found.value)


def new_stream(priority: int) -> torch.cuda.Stream:
    """Creates a stream that nobody else uses; it stays until the process ends."""
    made = ctypes.c_void_p()
    call("cudaStreamCreateWithPriority", ctypes.byref(made), NON_BLOCKING, priority)
    return torch.cuda.ExternalStream(made.value)


def priorities() -> tuple[int, int]:
    """Returns the lowest and the highest priority of a stream."""
    lowest, highest = ctypes.c_int(), ctypes.c_int()
    call("cudaDeviceGetStreamPriorityRange", ctypes.byref(lowest), ctypes.byref(highest))
    return lowest.value, highest.value


class RegisteredPage:
    """A page of host memory that streams can read, registered as the engine registers its flags.

    It stays until the process ends: whatever was at its address next would count as registered.
    """

    _all: list[RegisteredPage] = []  # noqa: RUF012 - shared by all on purpose

    def __init__(self) -> None:
        self._all.append(self)
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.word = ctypes.c_uint32.from_buffer(self._memory)
        self._here = ctypes.c_void_p(ctypes.addressof(self.word))
        there = ctypes.c_void_p()
        size = ctypes.c_size_t(mmap.PAGESIZE)
        call("cudaHostRegister", self._here, size, PORTABLE_AND_MAPPED)
        call("cudaHostGetDevicePointer", ctypes.byref(there), self._here, 0)
        self.address = there.value or 0

    def unregister(self) -> None:
        """Unregisters the page from the device."""
        call("cudaHostUnregister", self._here)


class MemoryHandle(ctypes.Structure):
    """A ``cudaIpcMemHandle_t``."""

    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


class _CopyAttributes(ctypes.Structure):
    _fields_ = [
        ("access_order", ctypes.c_int),
        ("hints", ctypes.c_int * 4),
        ("flags", ctypes.c_uint),
    ]


def copy_beside_computation(to: Tensor, source: Tensor) -> None:
    """Copies on the current stream by a copy engine, as csrc/comm/cuda_copy_batch.cpp does.

    Raises:
        MissingCallError: the runtime does not have the call, as before CUDA 12.8.
        RuntimeError: the call fails, as it does on the default stream.
    """
    attributes = _CopyAttributes(access_order=ACCESS_ORDER_STREAM, flags=PREFER_OVERLAP)
    first, count = ctypes.c_size_t(0), ctypes.c_size_t(1)
    size = ctypes.c_size_t(source.nbytes)
    addresses = [ctypes.byref(ctypes.c_void_p(tensor.data_ptr())) for tensor in (to, source)]
    described = ctypes.byref(attributes), ctypes.byref(first), count
    failed = [ctypes.byref(ctypes.c_size_t())] if _version() < 13000 else []
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    call("cudaMemcpyBatchAsync", *addresses, ctypes.byref(size), count, *described, *failed, stream)


@functools.cache
def _version() -> int:
    version = ctypes.c_int()
    call("cudaRuntimeGetVersion", ctypes.byref(version))
    return version.value
