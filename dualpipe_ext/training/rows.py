"""Which rows of a batch make which micro-batch, and where they enter and leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dualpipe_ext.schedule import Schedule

__all__ = ["RowPlan", "even_part", "even_parts"]


@dataclass(frozen=True)
class RowPlan:
    """Divides rows evenly among the ranks where they enter, then among the micro-batches there.

    If they do not divide evenly, the first parts have one row more, as in
    :meth:`dualpipe_ext.Pipeline.step`.

    Attributes:
        num_microbatches: the number of micro-batches of a step.
        entering: by rank, the micro-batches that enter there.
        leaving: by rank, the micro-batches that leave there.
    """

    num_microbatches: int
    entering: tuple[tuple[int, ...], ...]
    leaving: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, schedule: Schedule) -> RowPlan:
        """Returns the plan for a schedule."""
        ranks = range(schedule.num_ranks)
        first, last = 0, schedule.num_stages - 1
        return cls(
            schedule.num_microbatches,
            tuple(tuple(schedule.microbatches_at(first, rank)) for rank in ranks),
            tuple(tuple(schedule.microbatches_at(last, rank)) for rank in ranks),
        )

    def microbatches(self, rows: int) -> list[range]:
        """Returns the rows of each micro-batch, for a batch that all ranks have.

        Raises:
            ValueError: there are fewer rows than micro-batches.
        """
        if rows < self.num_microbatches:
            raise ValueError(
                f"the batch has {rows} rows, fewer than its {self.num_microbatches} micro-batches; "
                f"use a larger batch (drop_last=True where it is the last one), or "
                f"{self._smaller()}"
            )
        groups = self._groups()
        sizes = [
            size
            for part, group in zip(even_parts(rows, len(groups)), groups, strict=True)
            for size in even_parts(part, len(group))
        ]
        return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]

    def entering_rows(self, rank: int, rows: int) -> range:
        """Returns the rows that enter on a rank; empty if none do."""
        return self._span(self.entering[rank], rows)

    def leaving_rows(self, rank: int, rows: int) -> range:
        """Returns the rows that leave on a rank; empty if none do."""
        return self._span(self.leaving[rank], rows)

    def _groups(self) -> list[tuple[int, ...]]:
        """Returns the micro-batches of each rank where any enter."""
        return sorted(group for group in self.entering if group)

    def _smaller(self) -> str:
        """Says how to get fewer micro-batches."""
        num_ranks = len(self.entering)
        if len(self._groups()) == 2 and self.num_microbatches == 2 * num_ranks:
            return f"fewer ranks: num_microbatches={self.num_microbatches} is the least for {num_ranks}"
        return "a smaller num_microbatches"

    def _span(self, microbatches: Sequence[int], rows: int) -> range:
        cut = self.microbatches(rows)  # raises on every rank, those without rows included
        if not microbatches:
            return range(0)
        return range(cut[microbatches[0]].start, cut[microbatches[-1]].stop)


def even_parts(total: int, num_parts: int) -> list[int]:
    """Returns sizes that differ by at most one, the larger ones first."""
    return [total // num_parts + (part < total % num_parts) for part in range(num_parts)]


def even_part(total: int, part: int, num_parts: int) -> range:
    """Returns which of ``total`` items are in one of the :func:`even_parts`."""
    sizes = even_parts(total, num_parts)
    start = sum(sizes[:part])
    return range(start, start + sizes[part])
