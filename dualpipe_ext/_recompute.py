"""Forwards that run twice, but change buffers once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

__all__ = ["Contexts", "buffers_once"]

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def buffers_once(module: nn.Module) -> Callable[[], Contexts]:
    """``context_fn`` for ``torch.utils.checkpoint``: of a forward, and of its second run.

    The second run leaves buffers as they are, which a batch norm's statistics need: torch's
    checkpoint would count each micro-batch twice. Only submodules that change some buffer in the
    first run have theirs copied.
    """

    def contexts() -> Contexts:
        if next(module.buffers(), None) is None:
            return nullcontext(), nullcontext()
        changed: list[nn.Module] = []
        return _noting_changes(module, changed), _putting_back(changed)

    return contexts


@contextmanager
def _noting_changes(module: nn.Module, changed: list[nn.Module]) -> Iterator[None]:
    before = [(each, _marks(each)) for each in module.modules()]
    yield
    changed += [each for each, marks in before if _differ(marks, _marks(each))]


@contextmanager
def _putting_back(modules: list[nn.Module]) -> Iterator[None]:
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in kept:
            # Through .data: autograd may have saved the buffer, which has the same values again.
            buffer.data.copy_(value)
            module._buffers[name] = buffer


def _marks(module: nn.Module) -> list[tuple[Tensor, int]]:
    """Its buffers, each with what changes once it is changed in place."""
    buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
    return [(b, 0 if b.is_inference() else b._version) for b in buffers]


def _differ(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    pairs = zip(before, after, strict=False)
    return len(before) != len(after) or any(a is not b or v != w for (a, v), (b, w) in pairs)
