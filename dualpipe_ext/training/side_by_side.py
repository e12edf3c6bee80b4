"""Steps of pipelines side by side: each has its part of a batch; all succeed, or all fail."""

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
    """Runs steps on the pipelines of all replicas, with what these exchange before and after.

    A failure on any rank is an error on all ranks of all replicas.

    Args:
        pipeline: the pipeline of this replica.
        replicas: all replicas.
    """

    def __init__(self, pipeline: Pipeline, replicas: Replicas) -> None:
        self._pipeline = pipeline
        self._replicas = replicas

    def ready(
        self, cut: Callable[[], Part], check: Callable[[Part, int], object]
    ) -> tuple[Part, int]:
        """Returns this rank's part of a batch, and the units of all replicas' batches.

        Args:
            cut: takes this rank's part out of the batch.
            check: called with both before the step begins.

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
            step: called with whether the pipeline itself has to sum gradients over mirrors.
            sums_gradients: sum gradients over all copies of each stage. Then all messages have
                arrived on return, even those from GPU to GPU, so that no failure can end up as an
                update of parameters.

        Raises:
            PipelineError: a step failed on any rank.
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
        """Waits until all messages have arrived, as a step does not do from GPU to GPU.

        Raises:
            PipelineError: a step failed on any rank.
        """
        if self._pipeline.transport != "host":
            self._replicas.together(self._pipeline.synchronize)

    def _complete(self) -> None:
        """Does what is left to do until gradients are sums over all copies."""
        if not self._is_alone:
            self._replicas.sum_gradients(self._pipeline)
        self.settle()

    def summarize(self, own: Report) -> Report:
        """Combines the reports of all ranks of this pipeline, and the losses of all replicas."""
        with self._replicas.telling_failures():
            report = summarize(self._pipeline.group, own, self._pipeline.config.timeout)
        return replace(report, loss=math.fsum(self._replicas.gather(report.loss)))
