"""Forwards that run twice: both runs read the same buffers, and only the first changes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakSet

import torch
from torch import Tensor, nn

__all__ = ["RecomputedBuffers", "buffers_put_back"]

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]
ContextMaker = Callable[[], Contexts]
Buffers = dict[str, "Tensor | None"]

_SMALL_BYTES = 1 << 20  # of one module's own buffers


class RecomputedBuffers:
    """The buffers of a module whose forwards are recomputed.

    Between a forward and its second run, those of other micro-batches may change buffers: moving
    averages, the loads of experts, statistics of batch norms. The second run gets copies of the
    buffers as the first run found them, so that it computes the same, and whatever it changes is
    dropped with them. (Torch's checkpoint alone reads what is there by then, and changes it twice.)

    Small buffers are always copied, because not every change leaves a trace; large ones where one of
    the module's own was seen to change, for which the first forward of all is watched.
    """

    def __init__(self) -> None:
        self._changing: WeakSet[nn.Module] = WeakSet()
        self._is_first = True

    def contexts(self, module: nn.Module) -> ContextMaker:
        """Returns a ``context_fn`` for ``torch.utils.checkpoint``, for one forward of the module.

        Raises:
            ValueError: in the first run, a large buffer has changed of which there is no copy, in a
                module that changed none in its first forward.
        """

        def make() -> Contexts:
            if not any(each._buffers for each in module.modules()):
                return nullcontext(), nullcontext()
            found: dict[nn.Module, Buffers] = {}
            return self._first_run(module, found), _SecondRun(found)

        return make

    @contextmanager
    def _first_run(self, module: nn.Module, found: dict[nn.Module, Buffers]) -> Iterator[None]:
        marks = {each: _marks(each) for each in module.modules()}
        known: dict[int, Tensor] = {}
        copies = {each: _copies(each._buffers, known) for each in marks if self._is_copied(each)}
        self._is_first = False
        yield
        changed = {each for each, before in marks.items() if _differ(before, _marks(each))}
        if missing := changed - copies.keys():
            name = type(next(iter(missing))).__name__
            raise ValueError(
                f"a {name} has changed buffers of more than {_SMALL_BYTES >> 20} MiB, and did not in "
                f"its first forward, so that it cannot be recomputed; change them in each forward, "
                f"or pass DualPipeConfig(memory_optimization='none')"
            )
        self._changing.update(changed)
        found |= {each: own for each, own in copies.items() if each in changed or _is_small(each)}

    def _is_copied(self, module: nn.Module) -> bool:
        return self._is_first or module in self._changing or _is_small(module)


class _SecondRun:
    """Puts copies in the place of buffers; a graph that is kept is run through more than once."""

    def __init__(self, found: dict[nn.Module, Buffers]) -> None:
        self._found = found
        self._now: dict[nn.Module, Buffers] = {}

    def __enter__(self) -> None:
        known: dict[int, Tensor] = {}
        self._now = {module: dict(module._buffers) for module in self._found}
        for module, buffers in self._found.items():
            module._buffers.clear()
            module._buffers.update(_copies(buffers, known))

    def __exit__(self, *_: object) -> None:
        for module, buffers in self._now.items():
            module._buffers.clear()
            module._buffers.update(buffers)
        self._now = {}


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


def _copies(buffers: Buffers, known: dict[int, Tensor]) -> Buffers:
    """Returns copies; of one buffer, by its id in ``known``, there is one: shared ones stay shared."""
    for buffer in buffers.values():
        if buffer is not None and id(buffer) not in known:
            known[id(buffer)] = buffer.detach().clone()
    return {name: None if b is None else known[id(b)] for name, b in buffers.items()}


def _is_small(module: nn.Module) -> bool:
    own = [b for b in module._buffers.values() if b is not None]
    return sum(b.nbytes if b.layout == torch.strided else 0 for b in own) <= _SMALL_BYTES


def _marks(module: nn.Module) -> list[tuple[Tensor, int]]:
    """Returns a module's buffers, each with a number that changes when it is changed in place."""
    buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
    return [(b, 0 if b.is_inference() else b._version) for b in buffers]


def _differ(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    pairs = zip(before, after, strict=False)
    return len(before) != len(after) or any(a is not b or v != w for (a, v), (b, w) in pairs)
