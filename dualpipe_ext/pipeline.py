"""Pipelines: the modules of one rank, and the steps that run them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualpipe_ext import _C
from dualpipe_ext._batch import check_num_chunks, cut_batch
from dualpipe_ext._copies import check_copies
from dualpipe_ext._cuda import clock_by_gpu
from dualpipe_ext._frozen import FrozenWatch
from dualpipe_ext._handshake import agree, collect
from dualpipe_ext._local_stages import LocalStages
from dualpipe_ext._plans import PlannedStep, StepPlanner
from dualpipe_ext._runner import StepRunner
from dualpipe_ext._step import Criterion, LossHooks, Step, microbatch_seed
from dualpipe_ext._transport import EngineSettings, Offer, choose_transport
from dualpipe_ext._unsummed import UnsummedGradients
from dualpipe_ext.config import DualPipeConfig, Transport
from dualpipe_ext.gradients import (
    clip_local_gradients,
    parameters_with_main_grad,
    total_norm,
)
from dualpipe_ext.groups import PipelineGroup, resolve_group
from dualpipe_ext.microbatches import Joined
from dualpipe_ext.profiling import record_step
from dualpipe_ext.schedule import Schedule
from dualpipe_ext.stats import StepStatistics, TraceEvent
from dualpipe_ext.weight_grad import WeightSplitReport

__all__ = ["Pipeline"]


class Pipeline(nn.Module):
    """Stage modules of one rank, run by any schedule on the native engine.

    Every rank of the group makes one, with the modules of its own stages (:attr:`stages`), and
    calls :meth:`step`. Stages return a tensor, or a tuple of tensors and ``None`` of any dtype,
    which is what the next stage is called with.

    Args:
        modules: this rank's stages, in the order of :attr:`stages`. A partition of
            :mod:`dualpipe_ext.adapters` given twice stands for itself and the other one.
        schedule: a name of ``dualpipe_ext.schedule.schedules()``, or a schedule of one's own; the
            configuration's where left out.
        batch_dim: the dimension along which batches are cut.
        process_group: the ranks; torch's default group where left out.
        rank_mapping: entry i is the place in the pipeline of the group's rank i.
        config: the same on every rank.

    Raises:
        ValueError: wrong modules, a group that the schedule cannot serve, or ranks that differ in
            schedule, configuration or mirrored parameters. Raised on every rank.
        PipelineError: another rank could not be constructed.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        schedule: str | Schedule | None = None,
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | PipelineGroup | None = None,
        rank_mapping: Sequence[int] | None = None,
        *,
        config: DualPipeConfig | None = None,
    ) -> None:
        super().__init__()
        self.batch_dim = batch_dim
        self.config = (config or DualPipeConfig()).resolved()
        self.group = resolve_group(process_group, rank_mapping)
        self.rank = self.group.rank
        self.num_ranks = self.group.size
        facts = agree(
            self.group,
            self.config.timeout,
            lambda: self._adopt(list(modules), schedule or self.config.schedule),
        )
        self._settle([each["offer"] for each in facts])
        # A sharded gradient is there after the step alone.
        self._can_sum_within = self.config.overlap_strategy == "full" and not any(
            each["are sharded"] for each in facts
        )
        self._hooks = LossHooks()
        local = self._local
        self._planner = StepPlanner(
            local.source, self.rank, local.lookahead, local.overlapped.function is not None
        )
        self._num_steps = 0
        self._unsummed = UnsummedGradients(local.mirrors)
        self._frozen = FrozenWatch(is_told=local.is_first_with_losses)
        self._engine = self.group.make_engine(
            EngineSettings(local.peers(), self.config.timeout, local.gpu)
        )
        self._runner = StepRunner(self._engine, local, self.group)
        clock_by_gpu(self._engine, local.device)
        if local.gpu is not None:
            self._engine.connect()
        if self.config.mirror_init == "broadcast":
            self.sync_parameters()

    # What this rank is

    @property
    def stages(self) -> list[int]:
        """The stages that this rank holds, in the order of its modules."""
        return list(self._local.stages)

    @property
    def num_stages(self) -> int:
        """The stages of the whole model."""
        return self._local.num_stages

    @property
    def is_mirrored(self) -> bool:
        """Whether every stage has two copies, on ranks r and P-1-r."""
        return self._local.mirrors is not None

    @property
    def transport(self) -> Transport:
        """What messages travel over: ``"host"``, ``"nccl"`` or ``"copy"``, never ``"auto"``."""
        return self._local.transport

    @property
    def weight_split(self) -> WeightSplitReport:
        """Which weight gradients the schedule's W computes, and which ones are computed in I.

        Empty where the configuration does not split them.
        """
        return self._local.weight_split

    @property
    def num_steps(self) -> int:
        """Calls of :meth:`step` so far, of which random numbers depend where ``seed`` is set."""
        return self._num_steps

    def resume_at(self, num_steps: int, *, seed: int | None = None) -> None:
        """Goes on as after so many steps, with parameters that were loaded into all copies.

        Args:
            num_steps: of the pipeline that is continued.
            seed: its ``config.seed``. Left out, the own one stays; a pipeline without one gets none.
        """
        if seed is not None and self.config.seed is not None:
            self.config = replace(self.config, seed=seed)
        self._num_steps = num_steps
        self._engine.resume_at(num_steps)
        self._unsummed.clear()

    # Steps

    def step(
        self,
        *inputs: Tensor | None,
        num_chunks: int = 0,
        criterion: Criterion | None = None,
        labels: Sequence[Tensor | None] | None = None,
        return_outputs: bool = False,
        sync_gradients: bool = False,
    ) -> tuple[Tensor | None, Joined | tuple[Joined, ...]]:
        """Runs one batch forward and backward; under ``torch.no_grad()`` forward alone.

        All ranks call it with the same ``num_chunks``, ``return_outputs`` and ``sync_gradients``.
        Gradients accumulate in ``.grad``, as with ``loss.backward()`` for every micro-batch; those of
        a parameter that has a ``main_grad`` are added to that instead, whatever its type.

        Within ``torch.autocast`` forwards and criterion choose their types by it, and backwards run
        in these, as they do after the end of its scope (in a stage's own
        ``overlapped_forward_backward``, as that has it).

        Args:
            inputs: tensors with the batch along ``batch_dim``, on the ranks where micro-batches
                enter (DualPipe: the first and the last rank, each with its half of the batch;
                otherwise the first rank). ``None`` elsewhere.
            num_chunks: the number of micro-batches N, over both directions. What the schedule asks
                of it (``dualpipe``: even, at least 2P) holds for inference as well: it runs the
                forwards of the same plan.
            criterion: ``criterion(*outputs, *labels)`` gives one micro-batch's scalar loss.
            labels: tensors like the inputs, on the ranks where micro-batches leave. With DualPipe
                the first rank's labels belong to the last rank's inputs, and the other way round.
                ``()`` for a criterion that takes outputs alone.
            return_outputs: also return the last stage's outputs, without their graph.
            sync_gradients: sum the gradients of the two copies of each stage within the step, each
                part as soon as both copies have it (at the end, where messages of a GPU go by the
                host, or ranks on it are threads); in an accumulation over several steps, in the
                last one alone. Otherwise call :meth:`sync_gradients` before the optimizer.

        Returns:
            ``(loss, outputs)``. ``loss`` holds the losses of the micro-batches that leave on this
            rank, shape ``[number of these]``; ``None`` on other ranks and without a criterion.
            ``outputs`` has the whole of them along ``batch_dim`` (as a list of pieces where they do
            not fit together), a tuple where there are several, or is ``None``.

        Raises:
            ValueError, TypeError: a mistake on this rank: sizes, inputs, labels, criterion.
            PipelineError: a stage raised (the cause is chained), or another rank failed. The step
                failed on every rank; gradients are undefined (zero them); the next step works.
        """
        if self._runner.is_running:
            raise ValueError(
                "step() was called within a step, from a stage, criterion or hook; call it after "
                "the step has returned"
            )
        self._num_steps += 1
        training = torch.is_grad_enabled()
        num_chunks = num_chunks or self.config.num_microbatches
        sum_within = sync_gradients and self._can_sum_within
        with self._local.fully_sharded.step(training=training):
            try:
                check_num_chunks(num_chunks)
                self._local.fully_sharded.check()
                if training:
                    self._unsummed.warn_if_used(self.rank)
                    self._unsummed.begin_step()
                if training and sum_within:
                    self._unsummed.warn_if_accumulated(self.rank)
                plan = self._planner.plan(num_chunks, training, sum_within)
                step = self._make_step(plan, inputs, labels, criterion, training, return_outputs)
                reducer = self._gradient_sum() if sum_within and training else None
            except BaseException as error:  # the other ranks must not wait for this one
                self._tell(error, is_step=True)
                raise
            self._runner.run(plan, step, reducer)
        if training and not sum_within:
            self._unsummed.add()
            if sync_gradients:
                self.sync_gradients()
        elif training:
            self._unsummed.note_sum()
        record_step(self, training)
        return step.loss(), step.gathered_outputs()

    def abandon_step(self, error: BaseException) -> None:
        """Tells the other ranks that this one does not come to the next :meth:`step`.

        It fails on them with a ``PipelineError`` that has the text of the error, and counts as a
        step here as well. For what goes wrong on one rank before the step.
        """
        self._num_steps += 1
        with suppress(type(error)), self._local.fully_sharded.step(training=False):
            self._tell(error, is_step=True)
            raise error

    def abandon_sum(self, error: BaseException) -> None:
        """The same for the next :meth:`sync_gradients`, which is no step."""
        self._tell(error, is_step=False)

    def _tell(self, error: BaseException, *, is_step: bool) -> None:
        self._engine.fail(f"{type(error).__name__}: {error}", is_step)

    def sync_gradients(self) -> None:
        """Sums the gradients of the two copies of each stage; both copies get the same bits.

        Call it after the last :meth:`step` of an accumulation, on every rank. Nothing happens
        where stages have one copy. A gradient that is ``None`` on both copies stays so.
        """
        mirrors = self._local.mirrors
        if mirrors is not None:
            self._unsummed.warn_if_summed(self.rank)
            exchange = mirrors.gradient_sum(self._engine, self.config.bucket_bytes)
            with mirrors.lending_shards():
                self._engine.exchange(exchange, sorted(self.stages), "sync_gradients()")
            self._unsummed.note_sum()

    def synchronize(self) -> None:
        """Waits until the GPUs of all ranks are through with what they were told so far.

        Call it on every rank before trusting results for good, saving them for one. Over
        ``transport="nccl"`` and ``"copy"``, :meth:`step` returns before the GPU is done: a message
        that fails after that ends the next call, not the step, whose results are then worthless.

        Raises:
            PipelineError: a message of the last step failed, on any rank.
        """
        self._engine.synchronize()

    def mark_gradients_summed(self) -> None:
        """For loops that sum gradients over all copies of each stage themselves."""
        self._unsummed.note_sum()

    def sync_parameters(self) -> None:
        """Overwrites parameters and buffers of each stage's second copy with those of the first.

        The first copy of stage s is that on rank s. Called at construction by default.
        """
        if self._local.mirrors is not None:
            exchange = self._local.mirrors.copy(self._engine, self.config.bucket_bytes)
            self._engine.exchange(exchange, sorted(self.stages), "sync_parameters()")
            self._unsummed.note_copy()

    def check_copies(self) -> None:
        """Raises where the two copies of a stage have other bits in a parameter; all ranks call it.

        They stay equal by themselves: construction makes them so, and both get the same gradients.
        What sets them apart is weights that one rank alone has loaded or changed, or an optimizer
        of other settings. Saving a checkpoint looks as well, and warns.

        Raises:
            ValueError: they differ; on all ranks, with the first parameter that does.
            PipelineError: another rank does not come within ``config.timeout`` seconds, or is gone.
        """
        if self._local.mirrors is not None:
            modules = dict(zip(self.stages, self.module, strict=True))
            check_copies(self.group, self.config.timeout, modules)

    def sync_buffers(self) -> None:
        """Gives both copies of each floating-point buffer their mean; others stay as they are.

        For running statistics of batch norms, which each copy takes of its own micro-batches. Call
        it on every rank, before evaluating or saving. Nothing happens where stages have one copy.
        """
        if self._local.mirrors is not None:
            self._local.mirrors.average_buffers(self._engine, self.config.bucket_bytes, self.stages)

    def swap_with_mirror(self, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Gives tensors to the rank that has the other copies, and returns what that rank gives.

        Call it on every rank of a pipeline whose stages have two copies; some may give nothing.

        Args:
            tensors: of a floating-point type.
            like: tensors of the shapes and types that will come, whatever they hold.
        """
        if self._local.mirrors is None:
            raise ValueError(
                f"{self._local.source.name} has one copy of each stage: there are no mirrors"
            )
        return self._local.mirrors.swap(
            self._engine, self.config.bucket_bytes, self.stages, tensors, like
        )

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips the gradients of the whole model by their norm; returns the norm before.

        Every parameter counts once, however many copies it has: the norm is that of the unsplit
        model. Call it on every rank, after gradients are in sync. It waits for them on a GPU.

        Args:
            max_norm: above 0; ``float("inf")`` measures alone.
            norm_type: p of the p-norm, above 0; ``float("inf")`` for the largest element.

        Returns:
            The norm: a float64 scalar in host memory, the same on every rank.

        Raises:
            ValueError: ``max_norm`` or ``norm_type`` is not positive.
            PipelineError: another rank does not come within ``config.timeout`` seconds, or is gone.
        """
        if not max_norm > 0 or not norm_type > 0:
            raise ValueError(
                f"max_norm={max_norm}, norm_type={norm_type}: both must be above 0; "
                f"use float('inf') as max_norm to measure without clipping"
            )
        self._unsummed.warn_if_clipped(self.rank)
        counted = (
            self._local.mirrors.counted_parameters() if self._local.mirrors else self.parameters()
        )
        norm = total_norm(
            counted,
            norm_type,
            lambda values: self.group.all_gather_floats(values, self.config.timeout),
        )
        clip_local_gradients(self.parameters(), norm, max_norm)
        return norm

    def forward(self, *_: Any, **__: Any) -> Any:
        """Not a module to call: use :meth:`step`."""
        raise TypeError("a pipeline is not called; use step(), under torch.no_grad() for inference")

    # Hooks

    def register_before_backward_hook(
        self, hook: Callable[[Tensor, int], Tensor | None]
    ) -> RemovableHandle:
        """``hook(loss, microbatch)`` may return another loss to differentiate.

        One that is scaled, say, or has an auxiliary loss added. The losses that :meth:`step`
        returns stay the criterion's.
        """
        return _register(self._hooks.before_backward, hook)

    def register_after_forward_hook(
        self, hook: Callable[[Tensor, Sequence[Tensor | None], int], None]
    ) -> RemovableHandle:
        """``hook(loss, outputs, microbatch)`` is called when a micro-batch has its loss."""
        return _register(self._hooks.after_forward, hook)

    # What happened

    @property
    def last_trace(self) -> list[TraceEvent]:
        """Every computation of the last step on this rank, in order."""
        return self._runner.trace()

    @property
    def times_device(self) -> bool:
        """Whether steps from now on are timed by the GPU's clock.

        :meth:`stats` and :attr:`last_trace` then wait for the GPU and say what it did. It costs two
        to four events a computation; always so while profiling is enabled. On a CPU, or where the
        extension was built without CUDA, there is the host's clock alone.
        """
        return self._runner.times_device

    @times_device.setter
    def times_device(self, on: bool) -> None:
        self._runner.times_device = on

    def time_next_step(self) -> None:
        """Has the next training step timed by the GPU's clock, whatever :attr:`times_device` says."""
        self._runner.times_next = True

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the last training step of all ranks for Perfetto or ``chrome://tracing``.

        Call it on every rank; the first one writes the file, with a line for each rank of what it
        computed and waited for, from where its own step began, and below these the plan with
        F = I = W. On a GPU the times are the host's unless :attr:`times_device` was set before the
        step.

        Args:
            path: the file, JSON.

        Raises:
            ValueError: the last step was no training step, or there was none yet.
            PipelineError: so on another rank, or that does not come within ``config.timeout`` seconds.
        """
        self._runner.save_trace(Path(path), self.config.timeout)

    def stats(self) -> StepStatistics:
        """The last step on this rank, measured and planned.

        Raises:
            ValueError: no step was run yet.
        """
        return self._runner.stats()

    # Construction

    def _adopt(self, modules: list[nn.Module], schedule: str | Schedule) -> dict[str, Any]:
        """Checks and takes the modules; returns what the other ranks must know."""
        self._local = LocalStages(modules, schedule, self.group, self.config)
        self.module = nn.ModuleList(self._local.modules)
        return self._local.describe() | {"batch_dim": self.batch_dim}

    def _settle(self, offers: Sequence[Offer]) -> None:
        """Chooses what messages travel over, as all ranks do, and has the ranks find each other."""
        transport, reason = choose_transport(offers)
        if transport != "host" or reason:  # then there is something to fail at
            collect(
                self.group,
                self.config.timeout,
                lambda: self._local.use_transport(transport, reason),
                "could not make its pipeline",
            )
        self.group.connect(self.config.timeout)

    # One step

    def _make_step(
        self,
        plan: PlannedStep,
        inputs: Sequence[Tensor | None],
        labels: Sequence[Tensor | None] | None,
        criterion: Criterion | None,
        training: bool,
        return_outputs: bool,
    ) -> Step:
        plan.batch.check(inputs, labels, criterion, training)
        modules = dict(zip(self.stages, self.module, strict=True))
        number = self._num_steps
        seed = self.config.seed
        return Step(
            modules=modules,
            main_grads=parameters_with_main_grad(modules) if training else [],
            last_stage=self.num_stages - 1,
            inputs=cut_batch(inputs, plan.batch.entering, self.batch_dim, "inputs"),
            labels=cut_batch(labels or (), plan.batch.leaving, self.batch_dim, "labels"),
            criterion=None if criterion is None else self._frozen.watching(criterion),
            hooks=self._hooks,
            batch_dim=self.batch_dim,
            training=training,
            keep_outputs=return_outputs,
            seed=None if seed is None else lambda s, m: microbatch_seed(seed, number, s, m),
            overlapped_function=self._local.overlapped.function,
        )

    def _gradient_sum(self) -> _C.MirrorExchange | None:
        if self._local.mirrors is None:
            return None
        return self._local.mirrors.gradient_sum(self._engine, self.config.bucket_bytes)


def _register(hooks: dict[int, Any], hook: Callable[..., Any]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
