"""One rank's part of a batch: checked, and split into the micro-batches that enter or leave."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dualpipe_ext._step import Criterion
from dualpipe_ext.microbatches import Chunk, scatter
from dualpipe_ext.schedule import Schedule

__all__ = ["RankBatch", "check_num_chunks", "cut_batch"]

Given = Sequence[Tensor | None]


class RankBatch:
    """Which micro-batches enter (with inputs) and leave (with labels and losses) on a rank."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.rank = rank
        last_stage = schedule.num_stages - 1
        self.entering = schedule.microbatches_at(0, rank)
        self.leaving = schedule.microbatches_at(last_stage, rank)
        ranks = range(schedule.num_ranks)
        self.entry_ranks = [r for r in ranks if schedule.microbatches_at(0, r)]
        self.exit_ranks = [r for r in ranks if schedule.microbatches_at(last_stage, r)]

    def check(
        self, inputs: Given, labels: Given | None, criterion: Criterion | None, training: bool
    ) -> None:
        """Raises ValueError for data missing or on a wrong rank, TypeError for a wrong type."""
        if isinstance(labels, Tensor):
            raise TypeError("labels must be a tuple of tensors; found a tensor; pass labels=(y,)")
        self._check_inputs(any(x is not None for x in inputs))
        if any(x is not None for x in labels or ()) and not self.leaving:
            raise ValueError(
                f"labels were given on rank {self.rank}, where no micro-batch leaves; pass None "
                f"there and the tensors on {_ranks(self.exit_ranks)}"
            )
        if self.leaving:
            self._check_criterion(labels, criterion, training)

    def _check_inputs(self, given: bool) -> None:
        if self.entering and not given:
            raise ValueError(
                f"inputs are missing on rank {self.rank}, where micro-batches "
                f"{_span(self.entering)} enter; pass step(x, ...) there"
            )
        if given and not self.entering:
            raise ValueError(
                f"inputs were given on rank {self.rank}, where no micro-batch enters; pass None "
                f"there and the tensors on {_ranks(self.entry_ranks)}"
            )

    def _check_criterion(
        self, labels: Given | None, criterion: Criterion | None, training: bool
    ) -> None:
        where = f"on rank {self.rank}, where micro-batches {_span(self.leaving)} leave"
        if training and criterion is None:
            raise ValueError(
                f"criterion is missing {where}; pass criterion=, or use torch.no_grad()"
            )
        if criterion is not None and not callable(criterion):
            raise TypeError(
                f"criterion must be a function of outputs and labels that is called; found "
                f"{type(criterion).__name__} on rank {self.rank}"
            )
        if criterion is not None and (labels is None or any(x is None for x in labels)):
            raise ValueError(
                f"labels are missing {where}; pass labels=(...) there, or labels=() for a "
                f"criterion that takes outputs alone"
            )


def check_num_chunks(num_chunks: int) -> None:
    """Raises if the number of micro-batches is missing or is not a number."""
    if not isinstance(num_chunks, int) or isinstance(num_chunks, bool):
        raise TypeError(
            f"num_chunks={num_chunks!r}: it must be an int, not {type(num_chunks).__name__}"
        )
    if num_chunks < 1:
        raise ValueError(
            f"num_chunks={num_chunks}: it must be at least 1; give the number of micro-batches as "
            f"step(..., num_chunks=N) or once, as DualPipeConfig(num_microbatches=N)"
        )


def cut_batch(tensors: Given, microbatches: list[int], dim: int, what: str) -> dict[int, Chunk]:
    """Returns the pieces of ``tensors`` by micro-batch; empty if there is no micro-batch."""
    if not microbatches:
        return {}
    return dict(zip(microbatches, scatter(tensors, len(microbatches), dim, what), strict=True))


def _span(microbatches: Sequence[int]) -> str:
    return f"{microbatches[0]} to {microbatches[-1]}"


def _ranks(ranks: Sequence[int]) -> str:
    return " and ".join(f"rank {rank}" for rank in ranks)
