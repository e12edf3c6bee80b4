"""Steps of pipelines side by side: each has its part of a batch, and all of them come through."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from dualpipe_ext._C import PipelineError
from dualpipe_ext.pipeline import Pipeline
from dualpipe_ext.training.parts import Part
from dualpipe_ext.training.replicas import Replicas
from dualpipe_ext.training.reports import Report, summarize

__all__ = ["StepsSideBySide"]

T = TypeVar("T")


class StepsSideBySide:
    """What replicas exchange around a step of each one's pipeline.

    A failure on any rank is an error on all ranks of all replicas.

    Args:
        pipeline: this replica's.
        replicas: all of them.
    """

    def __init__(self, pipeline: Pipeline, replicas: Replicas) -> None:
        self._pipeline = pipeline
        self._replicas = replicas

    def ready(
        self, cut: Callable[[], Part], check: Callable[[Part, int], object]
    ) -> tuple[Part, int]:
        """This rank's part of a batch, and the units of all replicas' batches.

        Args:
            cut: takes the part out of the batch.
            check: is called with both, before a step begins.

        Raises:
            Exception: what ``cut`` or ``check`` raised here.
            PipelineError: one of them raised on another rank.
        """
        with self._replicas.telling_failures():
            part = cut()
        try:
            units = int(sum(self._replicas.gather(part.total)))
            check(part, units)
        except (PipelineError, ValueError) as error:
            self._pipeline.abandon_step(error)
            raise
        return part, units

    def run(self, step: Callable[[bool], T], sums_gradients: bool) -> T:
        """Runs a step on all replicas.

        Args:
            step: is told whether the pipeline has to sum gradients over mirrors by itself.
            sums_gradients: over all copies of each stage. All messages have arrived then, from GPU to
                GPU as well: what failed does not become an update of parameters.

        Raises:
            PipelineError: a step failed, on any rank.
        """
        made = self._replicas.together(lambda: step(sums_gradients and self._is_alone))
        if sums_gradients:
            self._complete()
        return made

    def sync_gradients(self) -> None:
        """Sums gradients over all copies of each stage, after an accumulation.

        Raises as :meth:`run` does.
        """
        if self._is_alone:
            self._pipeline.sync_gradients()
        self._complete()

    @property
    def _is_alone(self) -> bool:
        return self._replicas.size == 1

    def settle(self) -> None:
        """Returns when all messages have arrived; from GPU to GPU, a step does not wait for them.

        Raises:
            PipelineError: a step failed, on any rank.
        """
        if self._pipeline.transport != "host":
            self._replicas.together(self._pipeline.synchronize)

    def _complete(self) -> None:
        """What is left to do until gradients are those of all copies."""
        if not self._is_alone:
            self._replicas.sum_gradients(self._pipeline)
        self.settle()

    def summarize(self, own: Report) -> Report:
        """The reports of all ranks of all replicas in one, but for the batches' fingerprints."""
        with self._replicas.telling_failures():
            report = summarize(self._pipeline.group, own, self._pipeline.config.timeout)
        return replace(report, loss=math.fsum(self._replicas.gather(report.loss)))
