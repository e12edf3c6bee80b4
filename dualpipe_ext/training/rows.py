"""Which rows of a batch make which micro-batch, and where they enter and leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dualpipe_ext.schedule import Schedule

__all__ = ["RowPlan", "even_part", "even_parts"]


@dataclass(frozen=True)
class RowPlan:
    """Rows go to the ranks where micro-batches enter in even parts, and to micro-batches likewise.

    Where that does not come out even, the first ones have one row more, as
    :meth:`dualpipe_ext.Pipeline.step` cuts.

    Attributes:
        num_microbatches: of the step.
        entering: by rank, the micro-batches that enter there.
        leaving: by rank, those that leave there.
    """

    num_microbatches: int
    entering: tuple[tuple[int, ...], ...]
    leaving: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, schedule: Schedule) -> RowPlan:
        """The plan for a schedule."""
        ranks = range(schedule.num_ranks)
        first, last = 0, schedule.num_stages - 1
        return cls(
            schedule.num_microbatches,
            tuple(tuple(schedule.microbatches_at(first, rank)) for rank in ranks),
            tuple(tuple(schedule.microbatches_at(last, rank)) for rank in ranks),
        )

    def microbatches(self, rows: int) -> list[range]:
        """The rows of each micro-batch, of a batch that all ranks have.

        Raises:
            ValueError: fewer rows than micro-batches.
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
        """The rows that enter on a rank; empty where none do."""
        return self._span(self.entering[rank], rows)

    def leaving_rows(self, rank: int, rows: int) -> range:
        """The rows that leave on a rank; empty where none do."""
        return self._span(self.leaving[rank], rows)

    def _groups(self) -> list[tuple[int, ...]]:
        """The micro-batches of each rank where some enter."""
        return sorted(group for group in self.entering if group)

    def _smaller(self) -> str:
        """How fewer micro-batches are had."""
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
    """Sizes that differ by one at most, the larger ones first."""
    return [total // num_parts + (part < total % num_parts) for part in range(num_parts)]


def even_part(total: int, part: int, num_parts: int) -> range:
    """Which of so many things are in one of the :func:`even_parts`."""
    sizes = even_parts(total, num_parts)
    start = sum(sizes[:part])
    return range(start, start + sizes[part])
