"""A batch as a training loop provides it: inputs and labels, of which every rank takes its part."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from dualpipe_ext._handshake import gather_numbers
from dualpipe_ext.groups import PipelineGroup
from dualpipe_ext.training.sampled_digest import sampled_digest

__all__ = ["Batch", "BatchReader", "fingerprint", "in_step", "is_batch"]

Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Batch:
    """The inputs of a model, in its own order, and the labels to compare its outputs with."""

    inputs: Tensors
    labels: Tensors

    def rows(self, dim: int) -> int:
        """Returns how many rows all tensors have along ``dim``.

        Raises:
            ValueError: there are no rows, tensors differ in their number, or one lacks ``dim``.
        """
        tensors = [tensor for tensor in (*self.inputs, *self.labels) if tensor is not None]
        for tensor in tensors:
            if tensor.dim() <= dim:
                raise ValueError(
                    f"the batch has a tensor of {tensor.dim()} dimensions; rows are counted along "
                    f"dim {dim}, and every tensor needs one for each row"
                )
        found = sorted({tensor.size(dim) for tensor in tensors})
        if len(found) != 1 or found[0] == 0:
            raise ValueError(
                f"the tensors of a batch must have equally many rows along dim {dim}, at least 1; "
                f"found {found}"
            )
        return found[0]

    def taken(self, rows: range, count: int, dim: int) -> Batch:
        """Returns some of the rows, the last of which is repeated until there are ``count``.

        If ``rows`` is empty, the row before it is repeated.
        """
        if rows == range(self.rows(dim)) and count == len(rows):
            return self
        places = torch.arange(rows.start, rows.start + count).clamp(max=rows.stop - 1)

        def take(tensors: Tensors) -> Tensors:
            return tuple(
                None if t is None else t.index_select(dim, places.to(t.device)) for t in tensors
            )

        return Batch(take(self.inputs), take(self.labels))


@dataclass(frozen=True)
class BatchReader:
    """Finds inputs and labels in what a loader yields.

    Attributes:
        inputs: the arguments of the model that the first stage takes; ``None`` if unknown.
        labels: the names of labels.
    """

    inputs: tuple[str, ...] | None
    labels: tuple[str, ...]

    def read(self, given: Any, partly: bool = False) -> Batch:
        """Returns the batch.

        Args:
            given: a tensor, which is the only input; a tuple whose last element is the labels and
                whose others are inputs; a pair of tuples; or a mapping by name.
            partly: whether inputs or labels may be missing, as ``None``.

        Raises:
            ValueError: names that the model does not know, or missing inputs or labels.
            TypeError: anything else.
        """
        if isinstance(given, Mapping):
            batch = self._read_names(given, partly)
        elif isinstance(given, Tensor):
            batch = Batch((given,), ())
        elif isinstance(given, (tuple, list)):
            batch = _read_places(given)
        else:
            raise TypeError(
                f"a batch is a tensor, a tuple (inputs, labels) or a mapping by name; found "
                f"{type(given).__name__}"
            )
        _check_tensors(batch, partly)
        return batch

    def read_inputs(self, given: Any) -> Batch:
        """Returns the batch as :meth:`read` does; of labels by name, any may be missing."""
        if isinstance(given, Mapping):
            given = {name: value for name, value in given.items() if name not in self.labels}
        return self.read(given)

    def _read_names(self, given: Mapping[str, Any], partly: bool) -> Batch:
        if self.inputs is None:
            raise ValueError(
                "a batch by name needs the names of the inputs, and stages of your own do not tell "
                "them; pass input_names=(...), or batches that are tuples"
            )
        known = [*self.inputs, *self.labels]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                raise ValueError(
                    f"the batch has {name!r}, which is neither an input of the model nor a label"
                    f"{f' (did you mean {close[0]!r}?)' if close else ''}; inputs are "
                    f"{', '.join(self.inputs)}; labels are {', '.join(self.labels)} (label_names=)"
                )
        labels = tuple(given.get(name) for name in self.labels)
        missing = [name for name, label in zip(self.labels, labels, strict=True) if label is None]
        if len(missing) == len(labels):
            labels = ()
        elif missing and not partly:
            raise ValueError(
                f"the batch has no {' and no '.join(missing)}, but other labels; give all labels, or "
                f"name only those that there are (label_names=)"
            )
        return Batch(tuple(given.get(name) for name in self.inputs), labels)


def is_batch(given: Any) -> bool:
    """Whether this is one batch, rather than an iterable of batches."""
    if isinstance(given, list):
        return any(isinstance(each, Tensor) for each in given)
    return isinstance(given, (Tensor, Mapping, tuple))


def in_step(batches: Iterable[Any], group: PipelineGroup, timeout: float) -> Iterator[Any]:
    """Yields the batches of a loader, as long as every rank has one.

    Raises:
        ValueError: some ranks have more batches than others; raised on all ranks.
        PipelineError: the loader of another rank failed, or takes more than ``timeout`` seconds
            longer than this one's.
    """
    given = iter(batches)
    found: list[Any] = []

    def read() -> float:
        try:
            found[:] = islice(given, 1)
        except Exception:
            raise
        except BaseException as error:  # Ctrl-C, say, of which the others must hear as well
            raise _InterruptedError(repr(error)) from error
        return float(len(found))

    for number in count():
        try:
            counts = gather_numbers(group, timeout, read, f"could not read batch {number}")
        except _InterruptedError as told:
            assert told.__cause__ is not None
            raise told.__cause__ from None
        if not any(counts):
            return
        if not all(counts):
            raise ValueError(
                f"the data ends after {number} batches on rank {counts.index(0)}, and goes on on "
                f"rank {counts.index(1)}; give every rank the same batches"
            )
        yield found[0]


class _InterruptedError(Exception):
    """What is no ``Exception`` came while a batch was read."""


def fingerprint(batch: Batch) -> float:
    """Returns a number, computed from a sample of values, by which to tell batches apart."""
    return float(sampled_digest((*batch.inputs, *batch.labels)))


def _read_places(given: Sequence[Any]) -> Batch:
    if len(given) == 2 and any(isinstance(part, (tuple, list)) for part in given):
        inputs, labels = (
            tuple(part) if isinstance(part, (tuple, list)) else (part,) for part in given
        )
        return Batch(inputs, labels)
    if len(given) < 2:
        return Batch(tuple(given), ())
    return Batch(tuple(given[:-1]), (given[-1],))


def _check_tensors(batch: Batch, partly: bool) -> None:
    for value in (*batch.inputs, *batch.labels):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"a batch holds tensors or None; found {type(value).__name__}")
    if partly:
        return
    if any(label is None for label in batch.labels):
        raise ValueError("a label of the batch is None; every rank needs all labels")
    if all(tensor is None for tensor in batch.inputs):
        raise ValueError("the batch has no inputs")
