"""Splits a batch into micro-batches, and joins their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Chunk", "Joined", "gather", "scatter"]

Chunk = tuple[Tensor | None, ...]
Joined = Tensor | list[Any] | None


def scatter(tensors: Sequence[Tensor | None], num_chunks: int, dim: int, what: str) -> list[Chunk]:
    """Splits every tensor along one dimension into chunks.

    If the rows do not divide evenly, the first chunks have one row more. ``None`` stays ``None``.

    Args:
        tensors: what to split.
        num_chunks: the number of chunks.
        dim: the dimension to split.
        what: "inputs" or "labels", for error messages.

    Raises:
        TypeError: something is neither a tensor nor ``None``.
        ValueError: a tensor lacks the dimension or has fewer rows than chunks, or tensors differ in
            their number of rows.
    """
    rows = {_rows(tensor, dim, what) for tensor in tensors if tensor is not None}
    if len(rows) > 1:
        raise ValueError(f"{what} differ in their number of rows along dim {dim}: {sorted(rows)}")
    for count in rows:
        if count < num_chunks:
            raise ValueError(
                f"{what} have {count} rows along dim {dim}, fewer than the {num_chunks} "
                f"micro-batches that they feed here; use a larger batch or a smaller num_chunks"
            )
    columns = [
        [None] * num_chunks if tensor is None else list(tensor.tensor_split(num_chunks, dim=dim))
        for tensor in tensors
    ]
    return [tuple(column[i] for column in columns) for i in range(num_chunks)]


def gather(chunks: Sequence[Sequence[Tensor | None]], dim: int) -> Joined | tuple[Joined, ...]:
    """Joins the outputs of micro-batches along ``dim``; a single output is not put into a tuple.

    An output that cannot be joined (``None`` in some micro-batches, or of different sizes in
    another dimension) is returned as the list of its pieces.
    """
    if len({len(chunk) for chunk in chunks}) > 1:
        return [tuple(chunk) for chunk in chunks]
    outputs = tuple(_join(column, dim) for column in zip(*chunks, strict=True))
    return outputs[0] if len(outputs) == 1 else outputs


def _join(column: Sequence[Tensor | None], dim: int) -> Joined:
    present = [tensor for tensor in column if tensor is not None]
    if not present:
        return None
    if len(present) < len(column) or len({_other_sizes(x, dim) for x in present}) > 1:
        return list(column)
    return torch.stack(present) if present[0].dim() == 0 else torch.cat(present, dim=dim)


def _other_sizes(tensor: Tensor, dim: int) -> tuple[int, ...]:
    sizes = list(tensor.shape)
    if -tensor.dim() <= dim < tensor.dim():
        del sizes[dim]
    return (tensor.dim(), *sizes)


def _rows(tensor: Tensor, dim: int, what: str) -> int:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be tensors or None; found {type(tensor).__name__}")
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(
            f"{what} have {tensor.dim()} dimensions; batch_dim={dim} is not one of them"
        )
    return tensor.size(dim)
