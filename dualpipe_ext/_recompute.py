"""Forwards that run twice, but change buffers once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

__all__ = ["Contexts", "buffers_once", "buffers_put_back"]

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def buffers_once(module: nn.Module) -> Callable[[], Contexts]:
    """Returns a ``context_fn`` for ``torch.utils.checkpoint``, for a forward and its second run.

    The second run leaves buffers unchanged, as the statistics of a batch norm require: with torch's
    checkpoint alone, each micro-batch would count twice. Buffers are copied only in submodules that
    changed one in the first run.
    """

    def contexts() -> Contexts:
        if next(module.buffers(), None) is None:
            return nullcontext(), nullcontext()
        changed: list[nn.Module] = []
        return _noting_changes(module, changed), buffers_put_back(changed)

    return contexts


@contextmanager
def _noting_changes(module: nn.Module, changed: list[nn.Module]) -> Iterator[None]:
    before = [(each, _marks(each)) for each in module.modules()]
    yield
    changed += [each for each, marks in before if _differ(marks, _marks(each))]


@contextmanager
def buffers_put_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leaves the modules' own buffers unchanged by what runs within."""
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
            # Through .data: autograd may have saved the buffer, whose values are the same again.
            buffer.data.copy_(value)
            module._buffers[name] = buffer


def _marks(module: nn.Module) -> list[tuple[Tensor, int]]:
    """Returns a module's buffers, each with a number that changes when it is changed in place."""
    buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
    return [(b, 0 if b.is_inference() else b._version) for b in buffers]


def _differ(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    pairs = zip(before, after, strict=False)
    return len(before) != len(after) or any(a is not b or v != w for (a, v), (b, w) in pairs)
