"""The two copies of each stage: what they hold, how they are compared and kept equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dualpipe_ext import _C
from dualpipe_ext._copies import digest
from dualpipe_ext._sharded import as_sharded, describe_sharding, is_sharded, local_part
from dualpipe_ext.gradients import main_grads, settle_placements

__all__ = ["MirroredStages", "check_memory", "describe_stage", "shared_parameters"]

T = TypeVar("T")


class MirroredStages:
    """The stages of one rank, r and P-1-r, whose other copies are on rank P-1-r.

    A parameter that both modules hold (tied embeddings on the first and the last rank) belongs to
    the lower stage, so that it is sent and counted once.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        stages: Sequence[int],
        modules: Sequence[nn.Module],
        device: torch.device,
    ) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._modules = sorted(zip(stages, modules, strict=True), key=lambda pair: pair[0])
        self._tied = bool(shared_parameters(modules))
        self._device = device
        self._sum: _C.MirrorExchange | None = None
        self._summed: list[list[int]] = []  # the ids of what it sums
        self._shards: list[tuple[Tensor, Tensor]] = []  # (sharded parameter, stand-in for its part)

    @property
    def are_sharded(self) -> bool:
        """Whether any parameter is sharded over other ranks."""
        return any(is_sharded(p) for _, module in self._modules for p in module.parameters())

    def gradient_sum(self, engine: _C.Engine, bucket_bytes: int) -> _C.MirrorExchange:
        """Returns the exchange that sums gradients in ``.grad`` and in ``main_grad``."""
        parameters = self._tensors(with_buffers=False)
        in_main = [main_grads(own) for _, own in parameters]
        present = _identities([own for _, own in parameters] + in_main)
        if self._sum is None or present != self._summed:  # parameters may be replaced
            self._shards = []
            tensors = [
                (stage, [self._summable(p) for p in own] + [_bearer(grad) for grad in grads])
                for (stage, own), grads in zip(parameters, in_main, strict=True)
            ]
            self._sum = self._exchange(engine, tensors, bucket_bytes, copy=False)
            self._summed = present
        return self._sum

    @contextmanager
    def lending_shards(self) -> Iterator[None]:
        """Makes sums work on this rank's parts of sharded gradients."""
        settle_placements(parameter for parameter, _ in self._shards)
        for parameter, stand_in in self._shards:
            stand_in.grad = None if parameter.grad is None else local_part(parameter.grad)
        try:
            yield
            for parameter, stand_in in self._shards:
                if parameter.grad is None and stand_in.grad is not None:  # the other copy's
                    assert is_sharded(parameter)
                    parameter.grad = as_sharded(stand_in.grad, parameter)
        finally:
            for _, stand_in in self._shards:
                stand_in.grad = None

    def copy(self, engine: _C.Engine, bucket_bytes: int) -> _C.MirrorExchange:
        """Returns the exchange that overwrites the second copies' values with the first's."""
        tensors = [
            (stage, [local_part(tensor) for tensor in own])
            for stage, own in self._tensors(with_buffers=True)
        ]
        return self._exchange(engine, tensors, bucket_bytes, copy=True)

    def swap(
        self, engine: _C.Engine, own: Sequence[Tensor], taken: Sequence[Tensor], bucket_bytes: int
    ) -> _C.MirrorExchange:
        """Returns the exchange that sends tensors, and puts the mirror's into ``.grad``."""
        given = [_bearer(tensor) for tensor in own]
        by_stage = {self._rank: given, self._num_ranks - 1 - self._rank: list(taken)}
        tensors = [(stage, by_stage[stage]) for stage, _ in self._modules]
        return self._exchange(engine, tensors, bucket_bytes, copy=False)

    def sum_of(
        self, engine: _C.Engine, totals: list[tuple[int, list[Tensor]]], bucket_bytes: int
    ) -> _C.MirrorExchange:
        """Returns the exchange that adds the mirror's tensors to those given for each stage."""
        tensors = [(stage, [_bearer(total) for total in own]) for stage, own in totals]
        return self._exchange(engine, tensors, bucket_bytes, copy=False)

    def by_stage(self, of: Callable[[nn.Module], T]) -> list[tuple[int, T]]:
        """Returns what a function returns for each stage's module."""
        return [(stage, of(module)) for stage, module in self._modules]

    def drifting_buffers(self) -> list[str]:
        """Returns statistics of batch norms, which each copy takes of its own half of the batch."""
        return [
            f"{f'{name}.' if name else ''}running_mean of stage {stage} ({type(norm).__name__})"
            for stage, module in self._modules
            for name, norm in module.named_modules()
            if isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None
        ]

    def num_changes(self) -> int:
        """Returns a number that grows whenever a trainable parameter is changed in place."""
        return sum(
            parameter._version
            for _, module in self._modules
            for parameter in module.parameters()
            if parameter.requires_grad and not parameter.is_inference()
        )

    def gradient_marks(self) -> list[tuple[int, int]]:
        """Returns, for each gradient, a pair that differs once it is replaced or changed."""
        parameters = [p for _, module in self._modules for p in module.parameters()]
        grads = [p.grad for p in parameters if p.grad is not None] + main_grads(parameters)
        if any(is_sharded(grad) for grad in grads):  # whose parts change without a trace
            return []
        return [(id(grad), grad._version) for grad in grads if not grad.is_inference()]

    def counted_parameters(self) -> list[Tensor]:
        """Returns the parameters that this rank adds to a norm: each on only one rank."""
        return next(own for stage, own in self._tensors(False) if stage == self._rank)

    def _summable(self, parameter: Tensor) -> Tensor:
        """Returns the parameter itself, or a stand-in for this rank's part if it is sharded."""
        if not is_sharded(parameter):
            return parameter
        stand_in = local_part(parameter)
        self._shards.append((parameter, stand_in))
        return stand_in

    def _exchange(
        self,
        engine: _C.Engine,
        tensors: list[tuple[int, list[Tensor]]],
        bucket_bytes: int,
        *,
        copy: bool,
    ) -> _C.MirrorExchange:
        return engine.mirror_exchange(
            num_ranks=self._num_ranks,
            stages=tensors,
            bucket_bytes=bucket_bytes,
            copy=copy,
            together=self._tied,
            device=str(self._device),
        )

    def _tensors(self, with_buffers: bool) -> list[tuple[int, list[Tensor]]]:
        seen: set[Tensor] = set()
        by_stage: list[tuple[int, list[Tensor]]] = []
        for stage, module in self._modules:
            state: list[Tensor] = list(module.parameters())
            if with_buffers:
                state += list(module.buffers())
            by_stage.append((stage, [tensor for tensor in state if tensor not in seen]))
            seen.update(state)
        return by_stage


def describe_stage(module: nn.Module, shared: set[nn.Parameter], *, with_values: bool) -> list[Any]:
    """Returns names, shapes and dtypes of parameters and buffers; on demand, a digest of values."""

    def kind(p: nn.Parameter) -> str:
        frozen = "" if p.requires_grad else ", frozen"
        in_both = ", shared with the other stage" if p in shared else ""
        return f"{p.dtype}{frozen}{in_both}{describe_sharding(p)}"

    described: list[Any] = [[n, list(p.shape), kind(p)] for n, p in module.named_parameters()]
    described += [
        [f"buffer {name}", list(buffer.shape), str(buffer.dtype)]
        for name, buffer in module.named_buffers()
    ]
    if with_values:
        state = module.state_dict().values()
        held = digest(value for value in state if isinstance(value, Tensor))
        described.append(f"values with digest {held}")
    return described


def _identities(tensors: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    return [[id(tensor) for tensor in some] for some in tensors]


def _bearer(grad: Tensor) -> Tensor:
    """Returns a tensor whose ``.grad`` is this one."""
    bearer = grad.detach()
    bearer.grad = grad
    return bearer


def check_memory(stages: Sequence[int], modules: Sequence[nn.Module]) -> None:
    """Raises if two different parameters of different stages share their memory.

    Each would be summed and updated separately. One parameter held by both stages is recognized.
    """
    owners: dict[tuple[torch.device, int], tuple[nn.Parameter, int, str]] = {}
    for stage, module in zip(stages, modules, strict=True):
        for name, parameter in module.named_parameters():
            if parameter.layout != torch.strided:
                continue
            place = parameter.device, local_part(parameter).data_ptr()
            if place[1] == 0:  # meta, empty, ...
                continue
            owner, other, owned = owners.setdefault(place, (parameter, stage, name))
            if owner is not parameter and other != stage:
                raise ValueError(
                    f"{owned} of stage {other} and {name} of stage {stage} are two parameters in "
                    f"one memory: make them one parameter, by module.weight = other.weight and "
                    f"not by its data"
                )


def shared_parameters(modules: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Returns the parameters that more than one of the modules holds."""
    seen: set[nn.Parameter] = set()
    shared: set[nn.Parameter] = set()
    for module in modules:
        own = set(module.parameters())
        shared |= seen & own
        seen |= own
    return shared
