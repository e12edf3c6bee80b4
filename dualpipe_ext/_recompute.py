"""Forwards that run twice: both runs read the same buffers, and only the first changes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakSet

from torch import Tensor, nn

__all__ = ["Contexts", "RecomputedBuffers", "buffers_put_back"]

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]
ContextMaker = Callable[[], Contexts]
Kept = list[tuple[nn.Module, str, Tensor, Tensor]]  # module, name, buffer, its value

_SMALL_BYTES = 1 << 20


class RecomputedBuffers:
    """The buffers of a module whose forwards are recomputed.

    Between a forward and its second run, those of other micro-batches may change buffers: moving
    averages, the loads of experts, statistics of batch norms. The second run gets copies of the
    buffers as the first run found them, so that it computes the same, and whatever it changes is
    dropped with them. (Torch's checkpoint alone reads what is there by then, and changes it twice.)

    What a forward changes shows only afterwards, so copies are made before it: of the buffers of
    modules that have changed one before, of small ones, and in the first forward of all. They are
    kept only where a buffer has changed.
    """

    def __init__(self) -> None:
        self._changing: WeakSet[nn.Module] = WeakSet()
        self._is_first = True

    def contexts(self, module: nn.Module) -> ContextMaker:
        """Returns a ``context_fn`` for ``torch.utils.checkpoint``, for one forward of the module.

        Raises:
            ValueError: in the first run, a buffer has changed of which there is no copy: a large one,
                in a module that changed none before.
        """

        def make() -> Contexts:
            if next(module.buffers(), None) is None:
                return nullcontext(), nullcontext()
            kept: Kept = []
            return self._first_run(module, kept), _second_run(kept)

        return make

    @contextmanager
    def _first_run(self, module: nn.Module, kept: Kept) -> Iterator[None]:
        before = {each: _marks(each) for each in module.modules()}
        copies = [own for each in before for own in self._copies(each)]
        self._is_first = False
        yield
        changed = {each for each, marks in before.items() if _differ(marks, _marks(each))}
        self._changing.update(changed)
        kept += [own for own in copies if own[0] in changed]
        missing = changed - {own[0] for own in kept}
        for each in missing:
            raise ValueError(
                f"a {type(each).__name__} has changed buffers of more than {_SMALL_BYTES >> 20} MiB, "
                f"and did not in its first forward, so that it cannot be recomputed; change them in "
                f"each forward, or pass DualPipeConfig(memory_optimization='none')"
            )

    def _copies(self, module: nn.Module) -> Kept:
        own = [(name, b) for name, b in module._buffers.items() if b is not None]
        is_small = sum(buffer.nbytes for _, buffer in own) <= _SMALL_BYTES
        if not (self._is_first or is_small or module in self._changing):
            return []
        return [(module, name, buffer, buffer.detach().clone()) for name, buffer in own]


@contextmanager
def _second_run(kept: Kept) -> Iterator[None]:
    by_identity = {id(buffer): value for _, _, buffer, value in kept}  # shared ones stay shared
    now = [(module, name, module._buffers[name]) for module, name, _, _ in kept]
    for module, name, buffer, _ in kept:
        module._buffers[name] = by_identity[id(buffer)]
    try:
        yield
    finally:
        for module, name, current in now:
            module._buffers[name] = current


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
