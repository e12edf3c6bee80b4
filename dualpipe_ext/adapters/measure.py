"""Measures the layers of a model: F, I and W in seconds, activations in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dualpipe_ext._recompute import buffers_put_back
from dualpipe_ext.adapters.cost import Cost, parameter_cost
from dualpipe_ext.adapters.plan import Stage
from dualpipe_ext.adapters.trace import tracing_lock

__all__ = ["measure"]

Tensors = list[Tensor | None]


def measure(
    pieces: Sequence[Stage], inputs: Sequence[Tensor | None], repeats: int = 3
) -> list[Cost]:
    """Runs the pieces one after the other and measures each ``repeats`` times; the least counts.

    Gradients of parameters, buffers and torch's random number generators are left as they are.

    Args:
        pieces: the stages that an adapter cut, in order.
        inputs: one micro-batch for the first of them, on its device.
        repeats: how often each action is run, after one run that does not count.

    Raises:
        ValueError: the model is on the meta device, where nothing can be run.
    """
    if any(p.is_meta for piece in pieces for p in piece.module.parameters()):
        raise ValueError(
            "a model on the meta device cannot be measured; use balance='parameters', or measure "
            "it once where it has values and give the sizes, as in balance=[...]"
        )
    costs = []
    values: Tensors = list(inputs)
    # Other ranks that are threads of this process would disturb the times; tracing, the runs.
    with tracing_lock, torch.random.fork_rng(_gpus(pieces)), torch.enable_grad():
        for piece in pieces:
            # Only one rank measures: its copies of the stages would differ from the others'.
            with buffers_put_back(piece.module.modules()):
                cost, values = _measure_piece(piece, values, repeats)
            costs.append(cost)
    return costs


def _gpus(pieces: Sequence[Stage]) -> list[torch.device]:
    devices = {p.device for piece in pieces for p in piece.module.parameters()}
    return [device for device in devices if device.type == "cuda"]


def _measure_piece(piece: Stage, inputs: Tensors, repeats: int) -> tuple[Cost, Tensors]:
    parameters = [p for p in piece.module.parameters() if p.requires_grad]
    own = [_leaf(x) for x in inputs]
    activation_bytes, outputs = _activation_bytes(piece, own, parameters)

    def forward() -> Tensors:
        return _as_list(piece.run(piece.module, *own))

    def backward(wanted: Sequence[Tensor]) -> Callable[[], object]:
        ends = [x for x in forward() if x is not None and x.requires_grad]
        grads = [torch.ones_like(x) for x in ends]
        if not ends or not wanted:
            return lambda: None
        return lambda: torch.autograd.grad(
            ends, wanted, grads, retain_graph=True, allow_unused=True
        )

    differentiable = [x for x in own if x is not None and x.requires_grad]
    forward_seconds = _least_seconds(forward, repeats)
    inputs_seconds = _least_seconds(backward(differentiable), repeats)
    both_seconds = _least_seconds(backward([*differentiable, *parameters]), repeats)
    cost = replace(
        parameter_cost(piece.module),
        forward=forward_seconds,
        backward_input=inputs_seconds,
        backward_weight=max(both_seconds - inputs_seconds, 0.0),
        activation_bytes=activation_bytes,
    )
    return cost, outputs


def _least_seconds(action: Callable[[], object], repeats: int) -> float:
    action()
    seconds = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        action()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _activation_bytes(
    piece: Stage, inputs: Tensors, parameters: Sequence[nn.Parameter]
) -> tuple[int, Tensors]:
    """Returns (bytes that a forward keeps, its outputs), not counting parameters, held anyway."""
    held = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = _as_list(piece.run(piece.module, *inputs))
    return sum(kept.values()), outputs


def _leaf(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not tensor.requires_grad:
        return tensor
    return tensor.detach().requires_grad_()


def _as_list(returned: object) -> Tensors:
    return list(returned) if isinstance(returned, tuple) else [returned]  # type: ignore[list-item]
