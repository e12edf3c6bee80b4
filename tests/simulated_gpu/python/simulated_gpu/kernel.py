"""One operation as work of a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simulated_gpu.memory import Memory, map_all, map_tensors
from simulated_gpu.streams import Streams

__all__ = ["Kernel", "OpOverload"]

OpOverload = torch._ops.OpOverload
Calculate = Callable[[Any, Any, Any], Any]

_CUDA = torch.device("cuda", 0)
_SEED_BITS = (1 << 63) - 1


class Kernel:
    """What is called for an operation on CUDA tensors.

    Args:
        op: the operation.
        streams: where its work goes.
        calculate: does it on the CPU, and tells on the meta device what comes out.
    """

    def __init__(self, op: OpOverload, streams: Streams, calculate: Calculate) -> None:
        arguments = op._schema.arguments
        self._op = op
        self._streams = streams
        self._calculate = calculate
        self._names = [argument.name for argument in arguments]
        self._tensors = [i for i, one in enumerate(arguments) if str(one.type) == "Tensor"]
        self._written = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
        self._draws = "generator" in self._names or op._schema.name == "aten::native_dropout"
        self._shapes: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Issue the operation; return what it will have written."""
        seed = self._take_seed(kwargs) if self._draws else None
        memory = map_all(_to_memory, (list(args), kwargs))
        shapes = self._shapes_of(memory, args, kwargs)
        if shapes is None:
            return self._when_all_is_there(memory, args, kwargs)
        results, sizes = shapes
        written = self._written_of(args, kwargs)
        if _resize(written, sizes):
            memory = map_all(_to_memory, (list(args), kwargs))
        if written:
            self._put(self._callable(args), memory, None, seed)
            return self._returned(written)
        made = map_tensors(_like, results)
        self._put(self._callable(args), memory, map_tensors(Memory.of, made), seed)
        return made

    def _put(self, op: Any, memory: Any, made: Any, seed: int | None) -> None:
        def work() -> None:
            args, kwargs = map_all(_to_tensor, memory)
            if seed is not None:
                kwargs["generator"] = torch.Generator().manual_seed(seed)
            results = self._calculate(op, args, kwargs)
            if made is not None:
                _fill(made, results)

        self._streams.put(work)

    def _when_all_is_there(self, memory: Any, args: Any, kwargs: Any) -> Any:
        """What comes out depends on values, for which the host has to wait."""
        torch.cuda.current_stream().synchronize()
        results = self._calculate(self._callable(args), *map_all(_to_tensor, memory))
        written = self._written_of(args, kwargs)
        return self._returned(written) if written else map_tensors(lambda x: x.to(_CUDA), results)

    def _callable(self, args: Any) -> Any:
        """The operation, or all of its name: numbers come as such where it takes tensors."""
        has_numbers = any(isinstance(args[i], (int, float)) for i in self._tensors if i < len(args))
        return self._op.overloadpacket if has_numbers else self._op

    def _shapes_of(self, memory: Any, args: Any, kwargs: Any) -> Any:
        """What the operation returns, on the meta device, and the sizes of what it writes.

        None: that depends on values.
        """
        key = repr(map_all(_without_address, memory))
        if key not in self._shapes:
            self._shapes[key] = self._find_shapes(args, kwargs)
        return self._shapes[key]

    def _find_shapes(self, args: Any, kwargs: Any) -> Any:
        meta_args, meta_kwargs = map_all(_to_meta, (list(args), kwargs))
        try:
            results = self._calculate(self._callable(args), meta_args, meta_kwargs)
        except NotImplementedError:
            return None
        if isinstance(results, (bool, int, float)):
            return None
        written = self._written_of(meta_args, meta_kwargs)
        return results, [x.shape if isinstance(x, Tensor) else None for x in written]

    def _written_of(self, args: Any, kwargs: Any) -> list[Any]:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        return [given[name] for name in self._written]

    def _returned(self, written: list[Any]) -> Any:
        count = len(self._op._schema.returns)
        return None if count == 0 else written[0] if count == 1 else tuple(written[:count])

    @staticmethod
    def _take_seed(kwargs: dict[str, Any]) -> int:
        """A seed for this call, from the device's generator, in the order of issue."""
        generator = kwargs.pop("generator", None) or torch.cuda.default_generators[0]
        offset = generator.get_offset()
        generator.set_offset(offset + 4)
        return hash((generator.initial_seed(), offset)) & _SEED_BITS


def _resize(written: list[Any], sizes: list[Any]) -> bool:
    wrong = [
        (x, size)
        for x, size in zip(written, sizes, strict=True)
        if isinstance(x, Tensor) and x.shape != size
    ]
    for x, size in wrong:
        x.resize_(size)
    return bool(wrong)


def _fill(made: Any, results: Any) -> None:
    if isinstance(made, Memory):
        made.tensor().copy_(results)
    elif isinstance(made, (list, tuple)):
        for one, result in zip(made, results, strict=True):
            _fill(one, result)


def _like(meta: Tensor) -> Tensor:
    return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=_CUDA)


def _to_meta(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_cuda:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return _elsewhere(x, "meta")


def _to_memory(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Memory.of(x) if x.is_cuda else x.clone()  # a number
    return _elsewhere(x, "cpu")


def _elsewhere(x: Any, where: str) -> Any:
    return torch.device(where) if isinstance(x, torch.device) and x.type == "cuda" else x


def _to_tensor(x: Any) -> Any:
    return x.tensor() if isinstance(x, Memory) else x


def _without_address(x: Any) -> Any:
    if isinstance(x, Memory):
        return x.dtype, x.size, x.stride
    return (x.dtype, x.shape) if isinstance(x, Tensor) else x
