"""What only a build with CUDA has; the native module's type stub is that of a build without."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dualpipe_ext import _C

__all__ = [
    "gpu_engine",
    "gpu_options",
    "gpu_thread_engine",
    "has_cuda",
    "num_queues",
    "require_cuda",
    "require_environment",
    "reserve_queues",
    "shapes_digest",
    "shared_queues",
]

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"  # read by the driver when CUDA starts; 8 if not set
MOST_QUEUES = 32


def has_cuda() -> bool:
    """Whether this build can send from GPU to GPU."""
    return hasattr(_C, "gpu_engine")


def require_cuda(transport: str) -> None:
    """Raises ValueError if this build has no CUDA or, for NCCL, if the process has loaded two."""
    if not has_cuda():
        raise ValueError(
            f"transport={transport!r} needs the extension with CUDA, and this one was built "
            f"without; python -m dualpipe_ext info shows what is missing, DUALPIPE_EXT_CUDA=1 asks "
            f"for it"
        )
    if transport == "nccl":
        _C.require_one_nccl()  # type: ignore[attr-defined]


def require_environment(transport: str) -> None:
    """Raises ValueError if an environment variable would make GPU-to-GPU messages hang or fail."""
    found = os.environ.get
    if found("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        raise ValueError(
            f"transport={transport!r} cannot be used with CUDA_LAUNCH_BLOCKING="
            f"{found('CUDA_LAUNCH_BLOCKING')}, under which the launch of a message waits for its "
            f"peer's; unset it, or look for the mistake with transport='host'"
        )
    if transport == "nccl" and found("NCCL_COMM_BLOCKING") == "0":
        raise ValueError(
            "transport='nccl' cannot be used with NCCL_COMM_BLOCKING=0, under which NCCL returns "
            "before a message was issued; unset it"
        )


def gpu_options(settings: object) -> Any:
    """The native ``GpuOptions`` of :class:`dualpipe_ext._transport.GpuSettings`, name by name."""
    return _C.GpuOptions(**vars(settings))  # type: ignore[attr-defined]


def gpu_engine(
    group: ProcessGroup,
    rank: int,
    group_ranks: Sequence[int],
    peers: Sequence[int],
    options: Any,
    timeout: float,
) -> _C.Engine:
    """An engine whose messages stay on the GPU, for a rank that is a process."""
    make: Callable[..., _C.Engine] = _C.gpu_engine  # type: ignore[attr-defined]
    return make(group, rank, group_ranks, peers, options, timeout)


def gpu_thread_engine(hub: _C.LoopbackHub, rank: int, options: Any, timeout: float) -> _C.Engine:
    """The same for a rank that is a thread."""
    make: Callable[..., _C.Engine] = _C.gpu_thread_engine  # type: ignore[attr-defined]
    return make(hub, rank, options, timeout)


def clock_by_gpu(engine: _C.Engine, device: torch.device) -> None:
    """Lets the engine time its steps by the clock of the device, if that is a GPU.

    If the extension was built without CUDA, only the host's clock is available.
    """
    if has_cuda() and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        _C.clock_by_gpu(engine, index)  # type: ignore[attr-defined]


def reserve_queues() -> None:
    """Requests all hardware queues that a GPU has, unless CUDA has started in this process.

    The driver reads their number once, when CUDA starts. A number set by the user is kept.
    """
    if has_cuda() and not torch.cuda.is_initialized():
        os.environ.setdefault(QUEUES, str(MOST_QUEUES))


def num_queues() -> int:
    """Returns how many hardware queues the streams of this process have in total."""
    return min(MOST_QUEUES, int(os.environ.get(QUEUES) or 8))


def shared_queues(num_streams: int) -> str | None:
    """Returns advice for the user if more queues would help ``num_streams`` streams, or ``None``.

    A message that waits for its peer holds up the computation behind it in the same queue.
    """
    found = num_queues()
    if found >= min(MOST_QUEUES, num_streams):
        return None
    return (
        f"{num_streams} streams share {found} hardware queues, so that a message which waits can "
        f"hold up computation; import dualpipe_ext or set {QUEUES}={MOST_QUEUES} before the first use of CUDA"
    )


def shapes_digest(rank: int, inputs: Sequence[Sequence[Tensor | None]]) -> int:
    """Returns a nonzero digest of shapes and dtypes of what enters on a rank; 0: nothing enters."""
    if not inputs:
        return 0
    described = [
        [None if x is None else (tuple(x.shape), str(x.dtype)) for x in one] for one in inputs
    ]
    digest = hashlib.blake2b(repr((rank, described)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
