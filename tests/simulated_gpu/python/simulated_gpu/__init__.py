"""Torch's operations on the simulated GPU: see ../../README.md.

Torch's own kernels, compiled for a GPU, cannot run without one. Each is replaced by one that finds out
from the meta device what comes out, takes memory for it from torch's CUDA allocator, and puts the
operation, on the memory as it is by then, into the current stream. The host goes on at once, as it does
with a GPU.

``install`` is called at the end of ``import torch``: it is an entry point of ``torch.backends``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from simulated_gpu.copies import Copy
from simulated_gpu.kernel import Kernel, OpOverload
from simulated_gpu.operations import calculate, dropout, wide_product
from simulated_gpu.streams import Streams, is_there

__all__ = ["install"]

# They need no kernel, or call one of the others.
NATIVE = {
    "_local_scalar_dense",
    "_pin_memory",
    "empty",
    "empty_strided",
    "is_pinned",
    "is_set_to",
    "record_stream",
    "resize_",
    "resize_as_",
    "set_",
}

_library: torch.library.Library | None = None


def install() -> None:
    """Replace torch's CUDA kernels; nothing without the simulated GPU."""
    global _library
    if not is_there():
        return
    _library = torch.library.Library("aten", "IMPL")
    streams = Streams()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name in _operations():
            op = _overload(name)
            kernel = None if op is None else _kernel_of(op, streams)
            if kernel is not None:
                _library.impl(name, kernel, "CUDA")
    for kind in ("flash", "mem_efficient", "cudnn"):  # the CPU has the plain one alone
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    _ = torch.ones(1, device="meta") + 1  # imports for seconds, which no test has to spare


def _operations() -> list[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    aten = [name.removeprefix("aten::") for name in names if name.startswith("aten::")]
    return ["copy_", *aten]


def _overload(name: str) -> OpOverload | None:
    packet, _, overload = name.partition(".")
    found = getattr(torch.ops.aten, packet, None)
    return None if found is None else getattr(found, overload or "default", None)


def _is_view(op: OpOverload) -> bool:
    infos = [returned.alias_info for returned in op._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _kernel_of(op: OpOverload, streams: Streams) -> Callable[..., Any] | None:
    name = op._schema.name.removeprefix("aten::")
    if name in NATIVE or _is_view(op):
        return None
    if name == "copy_":
        return Copy(streams)
    if name == "native_dropout":
        return Kernel(op, streams, dropout)
    if op._overloadname in ("dtype", "dtype_out") and name in ("mm", "addmm", "bmm", "baddbmm"):
        return Kernel(op, streams, wide_product)
    return Kernel(op, streams, calculate)
