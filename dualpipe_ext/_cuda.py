"""What a build with CUDA has beside the rest; the stub of the module is that of a build without."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dualpipe_ext import _C

__all__ = ["has_nccl", "nccl_engine", "require_nccl", "shapes_digest", "shared_queues"]


def has_nccl() -> bool:
    """Whether this build can send from GPU to GPU."""
    return hasattr(_C, "nccl_engine")


def require_nccl() -> None:
    """Raises ValueError where this build has no CUDA, or the process has two NCCLs."""
    if not has_nccl():
        raise ValueError(
            "transport='nccl' needs the extension with CUDA, and this one was built without; "
            "python -m dualpipe_ext info shows what is missing, DUALPIPE_EXT_CUDA=1 asks for it"
        )
    _C.require_one_nccl()  # type: ignore[attr-defined]


def nccl_engine(*, threads: bool = False, **settings: Any) -> _C.Engine:
    """An engine whose messages stay on the GPU; ``threads``: ranks share this process and a hub."""
    make: Callable[..., _C.Engine] = getattr(_C, "nccl_thread_engine" if threads else "nccl_engine")
    return make(**settings)


def shared_queues(num_streams: int) -> str | None:
    """What to tell the user where so many streams share hardware queues; ``None``: they do not.

    A message that waits for its peer holds up computation behind it in the same queue. The driver
    reads ``CUDA_DEVICE_MAX_CONNECTIONS`` when CUDA starts, before any stage is on a GPU.
    """
    found = int(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "8") or 8)
    if found >= min(32, num_streams):
        return None
    return (
        f"{num_streams} streams share {found} hardware queues, so that a message which waits can "
        f"hold up computation; set CUDA_DEVICE_MAX_CONNECTIONS=32 before the first use of CUDA"
    )


def shapes_digest(rank: int, inputs: Sequence[Sequence[Tensor | None]]) -> int:
    """A number from 1 for the shapes and types of what enters on a rank; 0: nothing enters."""
    if not inputs:
        return 0
    described = [
        [None if x is None else (tuple(x.shape), str(x.dtype)) for x in one] for one in inputs
    ]
    digest = hashlib.blake2b(repr((rank, described)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
