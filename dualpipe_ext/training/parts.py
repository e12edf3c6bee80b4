"""One rank's part of a step: its rows, and the weights of the micro-batches that leave there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from dualpipe_ext._handshake import collect
from dualpipe_ext.groups import PipelineGroup
from dualpipe_ext.training.batches import Batch
from dualpipe_ext.training.losses import BatchLoss
from dualpipe_ext.training.reports import NO_BATCH
from dualpipe_ext.training.rows import RowPlan, even_part, even_parts

__all__ = ["Cutter", "Part"]

Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Part:
    """What one rank passes to :meth:`dualpipe_ext.Pipeline.step`.

    Attributes:
        inputs: the rows that enter here; elsewhere, each is ``None``.
        labels: the labels of the rows that leave here, and finally the number of each row's
            micro-batch; ``None`` elsewhere.
        units: by micro-batch, the weight of its loss; 0 for those that leave elsewhere, if their
            labels are not known here.
        total: the units of all micro-batches.
        fingerprint: that of the batch, or ``NO_BATCH`` if this rank knows only its part.
    """

    inputs: Tensors
    labels: Tensors | None
    units: tuple[int, ...]
    total: int
    fingerprint: float = NO_BATCH


@dataclass(frozen=True)
class Cutter:
    """Takes one rank's part out of batches.

    Attributes:
        plan: where rows enter and leave.
        group: the ranks.
        loss: gives the weights of rows.
        device: the device of this rank's stages.
        dim: the dimension of the rows.
        timeout: seconds to wait for other ranks.
        share: (i, n): this pipeline takes the i-th of n parts of the rows of a whole batch.
    """

    plan: RowPlan
    group: PipelineGroup
    loss: BatchLoss
    device: torch.device
    dim: int
    timeout: float
    share: tuple[int, int] = (0, 1)

    def of_whole(self, batch: Batch, fill: bool = False) -> Part:
        """Returns this rank's part of a batch that all ranks have.

        Args:
            batch: the same on every rank.
            fill: repeat the last row if the pipeline has fewer rows than micro-batches, or none.
                The micro-batches of added rows have a weight of 0.

        Raises:
            ValueError: the batch cannot be split into the micro-batches.
        """
        own = even_part(batch.rows(self.dim), *self.share)
        given = rows = len(own)
        if fill:
            rows = max(rows, self.plan.num_microbatches)
        batch = batch.taken(own, rows, self.dim)
        cut = self.plan.microbatches(rows)
        units = [self._units(batch.labels, of) if of.stop <= given else 0 for of in cut]
        rank = self.group.rank
        leaving = self.plan.leaving_rows(rank, rows)
        inputs = self._take(batch.inputs, self.plan.entering_rows(rank, rows))
        labels = self._labels(_rows(batch.labels, leaving, self.dim), len(leaving))
        return Part(inputs, labels, tuple(units), sum(units))

    def of_halves(self, read: Callable[[], Batch]) -> Part:
        """Returns this rank's part, if it reads nothing else: inputs that enter, labels that leave.

        Raises:
            ValueError: it cannot be split, or the ends disagree about the rows of a micro-batch.
            PipelineError: this happened on another rank.
        """
        batch = Batch((), ())
        rank = self.group.rank

        def describe() -> dict[str, Any]:
            nonlocal batch
            batch = read()
            leaving = self._sizes(batch.labels, self.plan.leaving[rank], "labels")
            ends = accumulate(leaving.values(), initial=0)
            units = [self._units(batch.labels, range(a, b)) for a, b in pairwise(ends)]
            return {
                "entering": self._sizes(batch.inputs, self.plan.entering[rank], "inputs"),
                "leaving": leaving,
                "units": units,
            }

        told = collect(self.group, self.timeout, describe, "could not cut its part of the batch")
        _check_rows(told)
        units = [0] * self.plan.num_microbatches
        for number, own in zip(self.plan.leaving[rank], told[rank]["units"], strict=True):
            units[number] = own
        labels = self._labels(batch.labels, sum(told[rank]["leaving"].values()))
        total = sum(sum(facts["units"]) for facts in told)
        return Part(self._here(batch.inputs) or (None,), labels, tuple(units), total)

    def _units(self, labels: Tensors, rows: range) -> int:
        return self.loss.units(_rows(labels, rows, self.dim), len(rows))

    def _take(self, tensors: Tensors, rows: range) -> Tensors:
        return self._here(_rows(tensors, rows, self.dim)) if rows else (None,)

    def _labels(self, labels: Tensors, rows: int) -> Tensors | None:
        """Returns the labels of ``rows`` rows that leave here, and their micro-batches' numbers."""
        if not rows:
            return None
        here = torch.tensor(self.plan.leaving[self.group.rank])
        sizes = torch.tensor(even_parts(rows, len(here)))
        numbers = here.repeat_interleave(sizes).reshape([1] * self.dim + [rows])
        return (*self._here(labels), numbers)

    def _here(self, tensors: Tensors) -> Tensors:
        return tuple(
            None if tensor is None else tensor.to(self.device, non_blocking=True)
            for tensor in tensors
        )

    def _sizes(self, tensors: Tensors, microbatches: Sequence[int], what: str) -> dict[int, int]:
        present = tuple(tensor for tensor in tensors if tensor is not None)
        if not microbatches:
            if present:
                raise ValueError(
                    f"rank {self.group.rank} was given {what}, and no micro-batch "
                    f"{'enters' if what == 'inputs' else 'leaves'} there; give it None"
                )
            return {}
        if not present:
            raise ValueError(f"rank {self.group.rank} was given no {what}, which it needs")
        rows = Batch(present, ()).rows(self.dim)
        if rows < len(microbatches):
            raise ValueError(
                f"rank {self.group.rank} was given {what} of {rows} rows, fewer than the "
                f"{len(microbatches)} micro-batches there; use a larger batch, or a smaller "
                f"num_microbatches"
            )
        return dict(zip(microbatches, even_parts(rows, len(microbatches)), strict=True))


def _rows(tensors: Tensors, rows: range, dim: int) -> Tensors:
    return tuple(
        None if tensor is None else tensor.narrow(dim, rows.start, len(rows)) for tensor in tensors
    )


def _check_rows(told: Sequence[dict[str, Any]]) -> None:
    entering = {m: rows for facts in told for m, rows in facts["entering"].items()}
    leaving = {m: rows for facts in told for m, rows in facts["leaving"].items()}
    for number, rows in entering.items():
        if leaving[number] != rows:
            raise ValueError(
                f"micro-batch {number} enters with {rows} rows and leaves with the labels of "
                f"{leaving[number]}; give each rank the inputs of the rows that enter there and "
                f"the labels of those that leave there (TrainingWrapper.own_rows)"
            )
