"""Runs planned steps on the engine of one rank, and reports on the last one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dualpipe_ext import _C
from dualpipe_ext._C import PipelineError
from dualpipe_ext._cuda import shapes_digest
from dualpipe_ext._failure import is_the_stages
from dualpipe_ext._handshake import collect
from dualpipe_ext._local_stages import LocalStages
from dualpipe_ext._plans import PlannedStep
from dualpipe_ext._step import Step
from dualpipe_ext._trace_file import write_trace
from dualpipe_ext.groups import PipelineGroup
from dualpipe_ext.profiling import is_profiling
from dualpipe_ext.stats import StepStatistics, TraceEvent

__all__ = ["StepRunner"]


class StepRunner:
    """Runs the steps of one rank.

    Attributes:
        times_device: as ``Pipeline.times_device``.
        times_next: whether the next training step is timed by the GPU's clock in any case.
    """

    def __init__(self, engine: _C.Engine, local: LocalStages, group: PipelineGroup) -> None:
        self.times_device = False
        self.times_next = False
        self._engine = engine
        self._local = local
        self._group = group
        self._last_plan: PlannedStep | None = None

    def run(self, plan: PlannedStep, step: Step, reducer: _C.MirrorExchange | None) -> None:
        """Runs a step, summing gradients within it if there is a reducer.

        Raises:
            ValueError, TypeError: a mistake of the caller on this rank.
            PipelineError: a stage raised (the cause is chained), or another rank failed; shows the
                schedule around the action at which this rank stopped.
        """
        self._last_plan = plan
        self._engine.time_device(self.times_device or self.times_next or is_profiling())
        self.times_next = self.times_next and not step.training
        try:
            with self._own_random_numbers(step):
                self._engine.run(
                    plan.program,
                    step,
                    training=step.training,
                    keep_outputs=step.overlapped_function is not None,
                    device=str(self._local.device),
                    reducer=reducer,
                    shapes=self._shapes(step),
                    main_grads=step.main_grads,
                )
        except BaseException as error:
            where = plan.lowered.grid(self._group.rank, self._engine.cursor)
            if is_the_stages(error, step):
                raise PipelineError(f"{self._engine.failure}\n\n{where}") from error
            if isinstance(error, PipelineError):
                raise PipelineError(f"{error}\n\n{where}") from None
            raise
        finally:
            step.forget_errors()

    def trace(self) -> list[TraceEvent]:
        """Returns all computations of the last step, in order."""
        return [
            TraceEvent(action, start * 1e-9, end * 1e-9, wait * 1e-9)
            for action, start, end, wait in self._engine.trace_events
        ]

    def save_trace(self, path: Path, timeout: float) -> None:
        """Writes the last step of all ranks on the first one; all ranks call this together.

        Raises:
            ValueError: the last step was not a training step, or there was none.
            PipelineError: another rank has no trace to write, or did not join.
        """
        traces = collect(self._group, timeout, self._training_trace, "has no trace")
        if self._group.rank == 0:
            measured = [[TraceEvent(*event) for event in trace] for trace in traces]
            write_trace(path, measured, self._planned().timeline)

    def _training_trace(self) -> list[TraceEvent]:
        if not self._planned().trains:
            raise ValueError("the last step was inference; call save_trace() after a training step")
        return self.trace()

    def stats(self) -> StepStatistics:
        """Returns measured and planned statistics of the last step.

        Raises:
            ValueError: no step has run yet.
        """
        engine, plan = self._engine, self._planned()
        return StepStatistics(
            clock="device" if engine.times_are_of_the_device else "host",
            step_seconds=engine.step_ns * 1e-9,
            busy_seconds=engine.busy_ns * 1e-9,
            measured_bubble=1.0 - engine.busy_ns / max(engine.step_ns, 1),
            planned_bubble=plan.planned_bubble,
            peak_live_activations=engine.peak_live_activations,
            planned_peak_activations=plan.program.planned_peak_activations,
        )

    def _planned(self) -> PlannedStep:
        if self._last_plan is None:
            raise ValueError("there are no statistics before the first step()")
        return self._last_plan

    def _own_random_numbers(self, step: Step) -> AbstractContextManager[Any]:
        """Protects the caller's generators from a step that reseeds: equal ones stay equal."""
        if step.reseed is None or self._group.are_threads:  # which share one generator
            return nullcontext()
        device = self._local.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def _shapes(self, step: Step) -> int:
        """Returns what ranks must agree on, as only the first step of a kind describes messages."""
        if self._local.gpu is None:
            return 0
        return shapes_digest(self._group.rank, list(step.inputs.values()))
