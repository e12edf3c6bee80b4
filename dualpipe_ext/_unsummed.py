"""Watches for parameters that were changed by the gradients of one copy of a stage alone."""

from __future__ import annotations

from dualpipe_ext._advice import warn_caller
from dualpipe_ext._mirrors import MirroredStages

__all__ = ["UnsummedGradients"]


class UnsummedGradients:
    """Notices gradients of one copy alone that are used all the same, and sums made twice.

    Args:
        mirrors: the other copies; ``None``: there are none, and nothing to sum.
    """

    def __init__(self, mirrors: MirroredStages | None) -> None:
        self._mirrors = mirrors
        self._after_step: int | None = None  # their num_changes() after a step, until a sum
        self._summed: list[tuple[int, int]] = []  # the marks of gradients after their sum
        self._adds_to_sum = False  # whether the last step began with gradients as a sum left them
        self._has_warned = False

    def begin_step(self) -> None:
        """Looks at the gradients that a training step is about to add to."""
        self._adds_to_sum = bool(self._summed) and self._summed == self._marks()

    def add(self) -> None:
        """Notes that a step has left gradients to be summed."""
        self._summed = []
        if self._mirrors is not None:
            self._after_step = self._mirrors.num_changes()

    def note_copy(self) -> None:
        """Notes that parameters were made equal, which is not to be taken for an update."""
        if self._after_step is not None:
            self.add()

    def clear(self) -> None:
        """Forgets that there were gradients to be summed."""
        self._after_step = None
        self._summed = []

    def note_sum(self) -> None:
        """Notes that gradients were summed."""
        self._after_step = None
        self._summed = self._marks()

    def warn_if_summed(self, rank: int) -> None:
        """Warns if gradients are summed again with no step in between."""
        if self._summed and self._summed == self._marks():
            warn_caller(
                f"rank {rank}: gradients that were summed over the two copies of each stage are "
                f"summed again, which doubles them; call sync_gradients() once after the last "
                f"step(), or pass sync_gradients=True to it, not both"
            )
        else:
            self.warn_if_accumulated(rank)

    def warn_if_accumulated(self, rank: int) -> None:
        """Warns if what an earlier sum left is part of what is summed now."""
        if self._adds_to_sum:
            warn_caller(
                f"rank {rank}: gradients that were summed over the two copies of each stage were "
                f"added to and are summed again, which counts the earlier steps twice; in an "
                f"accumulation sum after its last step() alone, otherwise zero gradients before "
                f"each step()"
            )

    def warn_if_clipped(self, rank: int) -> None:
        """Warns if the norm is taken of one copy's gradients alone."""
        if self._after_step is not None and self._marks():
            warn_caller(
                f"rank {rank}: clip_grad_norm_() before gradients are summed over the two copies "
                f"of each stage takes the norm of one copy's half of the batch; call "
                f"sync_gradients() first, or step(..., sync_gradients=True)"
            )

    def warn_if_used(self, rank: int) -> None:
        """Warns once if parameters were changed before the sum."""
        if self._mirrors is None or self._after_step is None or self._has_warned:
            return
        if self._mirrors.num_changes() == self._after_step:
            return
        self._has_warned = True
        warn_caller(
            f"rank {rank}: parameters were changed after a step() whose gradients were "
            f"not summed over the two copies of each stage, so the copies train apart, each on "
            f"half of the batch; call sync_gradients() before the optimizer, or "
            f"step(..., sync_gradients=True). If you sum gradients yourself, call "
            f"mark_gradients_summed() when you have"
        )

    def _marks(self) -> list[tuple[int, int]]:
        """Which gradients there are, and how often each was changed in place."""
        return [] if self._mirrors is None else self._mirrors.gradient_marks()
