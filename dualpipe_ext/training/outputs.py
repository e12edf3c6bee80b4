"""Outputs of a whole batch, whose halves leave at both ends of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualpipe_ext._handshake import collect
from dualpipe_ext.pipeline import Pipeline

__all__ = ["Outputs", "first_rows", "join_ends"]

Outputs = Tensor | tuple[Tensor | None, ...] | None
Column = Tensor | None


def join_ends(pipeline: Pipeline, own: Any, timeout: float) -> Outputs:
    """Returns all outputs, on each rank where some of them leave; ``None`` elsewhere.

    Args:
        pipeline: the pipeline that computed them. If its stages have two copies, the first half of
            the rows leaves on the last rank, the other half on the first.
        own: what :meth:`Pipeline.step` returned here.
        timeout: seconds to wait for the other ranks.

    Raises:
        ValueError: the outputs of micro-batches cannot be joined.
        PipelineError: this happened on another rank.
    """
    columns = () if own is None else own if isinstance(own, tuple) else (own,)
    told = collect(
        pipeline.group, timeout, lambda: {"outputs": _describe(columns)}, "has no outputs"
    )
    if pipeline.is_mirrored:
        columns = _with_other_half(pipeline, columns, told)
    if not columns:
        return None
    return columns[0] if len(columns) == 1 else columns


def first_rows(outputs: Outputs, rows: int, dim: int) -> Outputs:
    """Returns the first ``rows`` rows of outputs."""
    if isinstance(outputs, tuple):
        return tuple(None if each is None else _first(each, rows, dim) for each in outputs)
    return None if outputs is None else _first(outputs, rows, dim)


def _first(output: Tensor, rows: int, dim: int) -> Tensor:
    return output.narrow(dim, 0, min(rows, output.size(dim)))


def _describe(columns: tuple[Any, ...]) -> list[Any]:
    if any(isinstance(column, list) for column in columns):
        raise ValueError(
            "the outputs of micro-batches do not fit together: they differ in their shapes beside "
            "the rows, or are not there in all of them; use Pipeline.step(..., "
            "return_outputs=True), which returns the pieces"
        )
    return [None if c is None else [list(c.shape), str(c.dtype)] for c in columns]


def _with_other_half(
    pipeline: Pipeline, own: tuple[Column, ...], told: Sequence[dict[str, Any]]
) -> tuple[Column, ...]:
    last = pipeline.num_ranks - 1
    described = told[last - pipeline.rank]["outputs"]
    came = iter(
        pipeline.swap_with_mirror(
            [column.contiguous() for column in own if column is not None],
            [_like(each, pipeline) for each in described if each is not None],
        )
    )
    other = tuple(None if each is None else next(came) for each in described)
    halves = (own, other) if pipeline.rank == last else (other, own)
    return tuple(_cat(*pair, pipeline.batch_dim) for pair in zip(*halves, strict=True))


def _like(described: Any, pipeline: Pipeline) -> Tensor:
    shape, dtype = described
    device = next(pipeline.parameters()).device
    return torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)


def _cat(first: Column, second: Column, dim: int) -> Column:
    return None if first is None or second is None else torch.cat([first, second], dim)
