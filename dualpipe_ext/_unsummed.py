"""Detects parameters that were updated by the gradients of only one copy of a stage."""

from __future__ import annotations

from dualpipe_ext._advice import warn_caller
from dualpipe_ext._mirrors import MirroredStages

__all__ = ["UnsummedGradients"]


class UnsummedGradients:
    """Detects gradients that are used before they are summed over both copies, or summed twice.

    Args:
        mirrors: the other copies; ``None``: there are none, and nothing to sum.
    """

    def __init__(self, mirrors: MirroredStages | None) -> None:
        self._mirrors = mirrors
        self._after_step: int | None = None  # mirrors' num_changes() after a step, until a sum
        self._summed: list[tuple[int, int]] = []  # the marks of gradients after their sum
        self._adds_to_sum = False  # whether the last step began with gradients as a sum left them
        self._has_warned = False

    def begin_step(self) -> None:
        """Inspects the gradients that a training step is about to add to."""
        self._adds_to_sum = bool(self._summed) and self._summed == self._marks()

    def add(self) -> None:
        """Notes that a step left gradients that are yet to be summed."""
        self._summed = []
        if self._mirrors is not None:
            self._after_step = self._mirrors.num_changes()

    def note_copy(self) -> None:
        """Notes that parameters were made equal, which must not be mistaken for an update."""
        if self._after_step is not None:
            self.add()

    def clear(self) -> None:
        """Forgets that there are gradients to be summed."""
        self._after_step = None
        self._summed = []

    def note_sum(self) -> None:
        """Notes that gradients were summed."""
        self._after_step = None
        self._summed = self._marks()

    def warn_if_summed(self, rank: int) -> None:
        """Warns if gradients are about to be summed again, with or without a step in between."""
        if self._summed and self._summed == self._marks():
            warn_caller(
                f"rank {rank}: gradients that were summed over the two copies of each stage are "
                f"summed again, which doubles them; call sync_gradients() once after the last "
                f"step(), or pass sync_gradients=True to it, not both"
            )
        else:
            self.warn_if_accumulated(rank)

    def warn_if_accumulated(self, rank: int) -> None:
        """Warns if the gradients to be summed contain those of an earlier sum."""
        if self._adds_to_sum:
            warn_caller(
                f"rank {rank}: gradients that were summed over the two copies of each stage were "
                f"added to and are summed again, which counts the earlier steps twice; in an "
                f"accumulation sum after its last step() alone, otherwise zero gradients before "
                f"each step()"
            )

    def warn_if_clipped(self, rank: int) -> None:
        """Warns if the norm is taken of only one copy's gradients."""
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
        """Returns which gradients there are, and how often each was changed in place."""
        return [] if self._mirrors is None else self._mirrors.gradient_marks()
