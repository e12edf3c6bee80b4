"""Detects uneven stages while a model is trained."""

from __future__ import annotations

from dualpipe_ext._advice import warn_caller
from dualpipe_ext.adapters import Imbalance, Partition, report_imbalance
from dualpipe_ext.pipeline import Pipeline

__all__ = ["ImbalanceWatch"]

FIRST, LAST = 3, 5  # steps; earlier ones are slow for other reasons
GAIN = 0.1  # share of the simulated step; smaller gains are within the noise of one layer
LEAST_SECONDS = 5e-4  # per stage and micro-batch; below, other things than layers take the time


class ImbalanceWatch:
    """Warns once, on the first rank, if moving one layer would make steps shorter.

    Three steps must agree that there is such a layer; it may differ if several are equally good.
    Stages on a GPU are timed by its clock, and each of the three steps waits for it at its end.

    Args:
        pipeline: the pipeline to watch, which is done only for a DualPipe of partitions.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._num_steps = 0
        self._seen: list[Imbalance] = []

    def after_step(self) -> None:
        """Inspects the training step that has just run; all ranks call it."""
        self._num_steps += 1
        if not FIRST - 1 <= self._num_steps <= LAST or not self._is_watched():
            return
        if self._num_steps >= FIRST:
            self._look()
        if self._num_steps < LAST:
            self._pipeline.time_next_step()

    def _is_watched(self) -> bool:
        modules = self._pipeline.module
        return self._pipeline.is_mirrored and all(isinstance(m, Partition) for m in modules)

    def _look(self) -> None:
        try:
            self._seen.append(report_imbalance(self._pipeline, threshold=GAIN))
        except ValueError:  # on all ranks: no backward, or a GPU and an extension without CUDA
            return
        if len(self._seen) == LAST - FIRST + 1 and self._pipeline.rank == 0:
            self._warn()

    def _warn(self) -> None:
        last = self._seen[-1]
        mean = sum(stage.seconds for stage in last.stages) / len(last.stages)
        if all(report.layer for report in self._seen) and mean >= LEAST_SECONDS:
            warn_caller(f"the stages are uneven: {last}; or let balance='time' find the sizes")
