"""What calls do while a stream waits for a flag, as for a message: cases of gpu_probe.py."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from cuda_calls import (
    MemoryHandle,
    RegisteredPage,
    call,
    copy_beside_computation,
    query_event,
    wait_for_value,
)
from memory_lender import MEMORY_BYTES, MemoryLender
from torch import Tensor

PATIENCE_S = 0.2  # whatever takes longer counts as blocked
LAUNCHES = 3000  # more than a queue holds, which is said to be 1000

Case = tuple[str, Callable[[], str]]  # its name, and what finds the answer
Work = Callable[[], object]


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
        """Returns whether the call returns soon, as text."""
        self._thread.join(PATIENCE_S)
        return "blocks" if self._thread.is_alive() else self._answer

    def end(self) -> None:
        """Waits until the call has returned."""
        self._thread.join()


class Scene:
    """A stream that waits for a word of host memory, as for a message, and an idle one."""

    def __init__(self) -> None:
        self._flag = RegisteredPage()
        self.waiting, self.idle = torch.cuda.Stream(), torch.cuda.Stream()
        self.result = torch.ones(1024, device="cuda")  # of the stream that waits
        self.source, self.target = (torch.ones(1 << 20, device="cuda") for _ in "01")
        self.event = torch.cuda.Event()
        self.event.record()  # otherwise it is not created
        for work in (*self.calls().values(), self.read_back):  # the first call may do more
            work()
        torch.cuda.synchronize()

    def calls(self) -> dict[str, Work]:
        """Returns calls that another thread may make meanwhile; none has to wait for the stream.

        All of them release the interpreter lock, so that this thread can report one that blocks.
        """
        return {
            "cudaEventQuery": partial(query_event, self.event),
            "launch of a kernel": partial(self.on_idle, lambda: self.target.add_(1)),
            "cudaMemcpyAsync": partial(self.on_idle, lambda: self.target.copy_(self.source)),
            "cudaMemcpyBatchAsync": partial(
                self.on_idle, lambda: copy_beside_computation(self.target, self.source)
            ),
        }

    def on_idle(self, work: Work) -> None:
        """Does the work on the idle stream."""
        with torch.cuda.stream(self.idle):
            work()

    def read_back(self) -> None:
        """Copies from the stream that waits to pageable memory of the host."""
        with torch.cuda.stream(self.waiting):
            self.result.cpu()

    def hold(self) -> None:
        """Makes the stream wait."""
        wait_for_value(self.waiting, self._flag.address, 1)
        with torch.cuda.stream(self.waiting):
            torch.cuda._sleep(1000)
            self.event.record()

    def let_go(self) -> None:
        """Ends the wait of the stream."""
        self._flag.word.value = 1


def meanwhile(prepare: Callable[[Scene], Work]) -> Iterator[Case]:
    """While a stream waits: does this call return, and does another thread's call meanwhile?"""

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

    for name in ("launch of a kernel", "cudaMemcpyAsync", "cudaMemcpyBatchAsync", "cudaEventQuery"):
        yield f"the other is {name}", partial(find, name)


def nothing(scene: Scene) -> Work:
    """Returns a call that does nothing, to see what the waiting stream alone does to others."""
    return lambda: None


def fill_queue(scene: Scene) -> Work:
    """Returns launches that fill the queue of the waiting stream, like a host that is far ahead."""

    def launch() -> None:
        with torch.cuda.stream(scene.waiting):
            for _ in range(LAUNCHES):
                scene.result.add_(1)

    return launch


def read_back(scene: Scene) -> Work:
    """Returns ``Tensor.cpu()`` of what the waiting stream computes."""
    return scene.read_back


def free_memory(scene: Scene) -> Work:
    """Returns ``cudaFree`` of memory that nobody uses."""
    memory = ctypes.c_void_p()
    call("cudaMalloc", ctypes.byref(memory), ctypes.c_size_t(1 << 20))
    return lambda: call("cudaFree", memory)


def allocate_memory(scene: Scene) -> Work:
    """Returns ``cudaMalloc``."""
    memory = ctypes.c_void_p()
    return lambda: call("cudaMalloc", ctypes.byref(memory), ctypes.c_size_t(1 << 20))


def allocate_host_memory(scene: Scene) -> Work:
    """Returns ``cudaHostAlloc``."""
    memory = ctypes.c_void_p()
    return lambda: call("cudaHostAlloc", ctypes.byref(memory), ctypes.c_size_t(1 << 20), 0)


def free_host_memory(scene: Scene) -> Work:
    """Returns ``cudaFreeHost``, as NCCL calls it when a communicator is aborted."""
    memory = ctypes.c_void_p()
    call("cudaHostAlloc", ctypes.byref(memory), ctypes.c_size_t(1 << 20), 0)
    return lambda: call("cudaFreeHost", memory)


def unregister_host_memory(scene: Scene) -> Work:
    """Returns ``cudaHostUnregister``, as the link of copy engines calls it when it ends."""
    return RegisteredPage().unregister


def export_memory(scene: Scene) -> Work:
    """Returns ``cudaIpcGetMemHandle``, as the link of copy engines calls it for a new block."""
    memory = ctypes.c_void_p()
    call("cudaMalloc", ctypes.byref(memory), ctypes.c_size_t(MEMORY_BYTES))
    return lambda: call("cudaIpcGetMemHandle", ctypes.byref(MemoryHandle()), memory)


def open_memory(lender: MemoryLender, scene: Scene) -> Work:
    """Returns ``cudaIpcOpenMemHandle`` of memory of another process."""
    handle, opened = lender.handle(), ctypes.c_void_p()
    lazily = ctypes.c_uint(1)  # cudaIpcMemLazyEnablePeerAccess, the only flag there is
    return lambda: call("cudaIpcOpenMemHandle", ctypes.byref(opened), handle, lazily)


def meanwhile_opening() -> Iterator[Case]:
    """The same as :func:`meanwhile` of ``cudaIpcOpenMemHandle``; starts CUDA in two processes."""
    lender = MemoryLender()
    yield from meanwhile(partial(open_memory, lender))


# From torch's own library, each in a module of its own; none is compiled at its first use.
_NEW_KERNELS = iter([torch.atan, torch.sinh, torch.log2, torch.trunc])


def load_kernel(scene: Scene) -> Work:
    """Returns the first launch of a kernel, which loads it."""
    kernel: Callable[..., Tensor] = next(_NEW_KERNELS)
    return partial(scene.on_idle, lambda: kernel(scene.source, out=scene.target))


CALLS: dict[str, Callable[[Scene], Work]] = {
    "nothing is called": nothing,
    "its queue is filled": fill_queue,
    "Tensor.cpu() of its result is called": read_back,
    "a kernel is loaded": load_kernel,
    "cudaFree is called": free_memory,
    "cudaMalloc is called": allocate_memory,
    "cudaIpcGetMemHandle is called": export_memory,
    "cudaHostUnregister is called": unregister_host_memory,
    "cudaHostAlloc is called": allocate_host_memory,
    "cudaFreeHost is called": free_host_memory,
}
