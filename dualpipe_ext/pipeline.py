"""Pipelines: the modules of one rank, and the steps that run them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualpipe_ext._batch import check_num_chunks, cut_batch
from dualpipe_ext._copies import check_copies
from dualpipe_ext._cuda import clock_by_gpu
from dualpipe_ext._frozen import FrozenWatch
from dualpipe_ext._handshake import agree, collect, gather_numbers
from dualpipe_ext._local_stages import LocalStages
from dualpipe_ext._memory import save_where_compiled
from dualpipe_ext._mirror_exchanges import MirrorExchanges, tell
from dualpipe_ext._plans import PlannedStep, StepPlanner
from dualpipe_ext._random import microbatch_seed, seed_generators
from dualpipe_ext._runner import StepRunner
from dualpipe_ext._step import Criterion, LossHooks, Step
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

_FAILURE = "could not make its pipeline"


class Pipeline(nn.Module):
    """Runs the stage modules of one rank by any schedule, on the native engine.

    Every rank of the group constructs one from the modules of its own stages (:attr:`stages`) and
    calls :meth:`step`. A stage returns a tensor, or a tuple of tensors and ``None``, of any dtype;
    the next stage is called with what it returned.

    Args:
        modules: this rank's stages, in the order of :attr:`stages`. A partition from
            :mod:`dualpipe_ext.adapters` given twice stands for itself and its mirror.
        schedule: a name from ``dualpipe_ext.schedule.schedules()``, or a schedule of your own;
            defaults to the configured one.
        batch_dim: the dimension along which batches are split.
        process_group: the ranks of the pipeline; by default the threads of ``run_ranks()``, if this
            is one of them, otherwise torch's default group.
        rank_mapping: entry i is the position in the pipeline of the group's rank i.
        config: must be the same on every rank.

    Raises:
        ValueError: the modules or the group do not suit the schedule or the configuration; or, on
            every rank, ranks differ in schedule, configuration or mirrored parameters.
        TypeError: an argument of the wrong type.
        PipelineError: another rank could not construct its pipeline.
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
        if not isinstance(config, DualPipeConfig | None):
            raise TypeError(
                f"config={config!r}: it must be a DualPipeConfig, such as "
                f"DualPipeConfig.from_dict({{...}})"
            )
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
        is_any_sharded = any(each["has shards"] for each in facts)
        self._local.fully_sharded.connect(self.group if is_any_sharded else None)
        # Sharded gradients exist only after the step.
        self._can_sum_within = self.config.overlap_strategy == "full" and not any(
            each["are sharded"] for each in facts
        )
        self._hooks = LossHooks()
        local = self._local
        self._planner = StepPlanner(
            local.source, self.rank, local.lookahead, local.overlapped.function is not None
        )
        self._num_steps = 0
        self._is_exchanging = threading.Lock()
        self._unsummed = UnsummedGradients(local.mirrors)
        self._frozen = FrozenWatch(is_told=local.is_first_with_losses)
        collect(self.group, self.config.timeout, self._make_engine, _FAILURE)
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
        """The number of stages of the whole model."""
        return self._local.num_stages

    @property
    def is_mirrored(self) -> bool:
        """Whether every stage has two copies, on ranks r and P-1-r."""
        return self._local.mirrors is not None

    @property
    def transport(self) -> Transport:
        """What messages travel over: ``"host"``, ``"nccl"`` or ``"copy"``; never ``"auto"``."""
        return self._local.transport

    @property
    def weight_split(self) -> WeightSplitReport:
        """Which weight gradients are computed in W, and which in I.

        Empty if the configuration does not split them.
        """
        return self._local.weight_split

    @property
    def num_steps(self) -> int:
        """The number of calls of :meth:`step` so far; with ``seed``, it affects random numbers."""
        return self._num_steps

    def resume_at(self, num_steps: int, *, seed: int | None = None) -> None:
        """Continues as if ``num_steps`` steps had run; parameters must be loaded into all copies.

        Args:
            num_steps: the number of steps of the pipeline being continued.
            seed: the ``config.seed`` of that pipeline; by default this pipeline keeps its own. A
                pipeline without a seed does not take one.
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
        """Runs one batch forward and backward; under ``torch.no_grad()``, forward only.

        All ranks must pass the same ``num_chunks``, ``return_outputs`` and ``sync_gradients``.
        Gradients accumulate in ``.grad``, as with ``loss.backward()`` for every micro-batch; if a
        parameter has a ``main_grad``, its gradient is added to that instead, whatever its dtype.

        Under ``torch.autocast``, forwards and the criterion choose their dtypes accordingly, and
        backwards run in these dtypes, as they would after the end of the autocast scope. (A stage's
        own ``overlapped_forward_backward`` decides this for itself.)

        Args:
            inputs: tensors with the batch along ``batch_dim``, on the ranks where micro-batches
                enter (DualPipe: the first and the last rank, each with its half of the batch;
                otherwise the first rank). ``None`` on other ranks.
            num_chunks: the number of micro-batches N, over both directions; defaults to
                ``config.num_microbatches``. What the schedule requires of it (``dualpipe``: even,
                at least 2P) also applies to inference, which runs the forwards of the same plan.
            criterion: ``criterion(*outputs, *labels)`` returns the scalar loss of one micro-batch.
            labels: tensors with the batch along ``batch_dim``, on the ranks where micro-batches
                leave. With DualPipe, the first rank's labels belong to the last rank's inputs, and
                vice versa. ``()`` for a criterion that takes only outputs.
            return_outputs: also return the outputs of the last stage, detached from their graph.
            sync_gradients: sum the gradients of the two copies of each stage within the step, each
                bucket as soon as both copies have it (at the end of the step if a GPU's messages go
                through the host or its ranks are threads). When accumulating over several steps,
                set it only in the last one. If it is not set, call :meth:`sync_gradients` before
                the optimizer step.

        Returns:
            ``(loss, outputs)``. ``loss`` holds the losses of the micro-batches that leave on this
            rank, one element for each; ``None`` on other ranks and without a criterion.
            ``outputs`` holds their outputs, joined along ``batch_dim`` (as a list of pieces if they
            cannot be joined); a tuple if there are several; ``None`` if they were not requested.

        Raises:
            ValueError, TypeError: a mistake on this rank, in sizes, inputs, labels or criterion.
            PipelineError: a stage raised (the cause is chained), or another rank failed. The step
                failed on every rank and gradients are undefined (zero them); the next step works.
        """
        with self._alone("step()"):
            return self._step(inputs, num_chunks, criterion, labels, return_outputs, sync_gradients)

    @contextmanager
    def _alone(self, call: str) -> Iterator[None]:
        """Refuses calls that exchange something while another one does."""
        if not self._is_exchanging.acquire(blocking=False):
            raise ValueError(
                f"{call} was called within a step, from a stage, criterion or hook, or by another "
                f"thread; call it after the step has returned"
            )
        try:
            yield
        finally:
            self._is_exchanging.release()

    def _step(
        self,
        inputs: Sequence[Tensor | None],
        num_chunks: int,
        criterion: Criterion | None,
        labels: Sequence[Tensor | None] | None,
        return_outputs: bool,
        sync_gradients: bool,
    ) -> tuple[Tensor | None, Joined | tuple[Joined, ...]]:
        self._num_steps += 1
        training = torch.is_grad_enabled()
        num_chunks = num_chunks or self.config.num_microbatches
        sum_within = sync_gradients and self._can_sum_within
        with self._local.fully_sharded.step(training=training):
            try:
                check_num_chunks(num_chunks)
                self._local.fully_sharded.begin()
                if training:
                    self._unsummed.warn_if_used(self.rank)
                    self._unsummed.begin_step()
                if training and sum_within:
                    self._unsummed.warn_if_accumulated(self.rank)
                if labels is not None and not isinstance(labels, Tensor):
                    labels = tuple(labels)
                plan = self._planner.plan(num_chunks, training, sum_within)
                step = self._make_step(plan, inputs, labels, criterion, training, return_outputs)
                sums = self._exchanges if sum_within and training else None
                reducer = sums.gradient_sum() if sums else None
            except BaseException as error:  # the other ranks must not wait for this one
                self._tell(error, is_step=True)
                raise
            self._runner.run(plan, step, reducer)
        if training and not sum_within:
            self._unsummed.add()
            if sync_gradients:
                self._sum_gradients()
        elif training:
            self._unsummed.note_sum()
        record_step(self, training)
        return step.loss(), step.gathered_outputs()

    def abandon_step(self, error: BaseException) -> None:
        """Tells the other ranks that this one will not take part in the next :meth:`step`.

        For errors that occur on one rank before the step. The other ranks' step fails with a
        ``PipelineError`` that contains the text of ``error``; it counts as a step here, too.
        """
        self._num_steps += 1
        with suppress(type(error)), self._local.fully_sharded.step(training=False):
            self._tell(error, is_step=True)
            raise error

    def abandon_sum(self, error: BaseException) -> None:
        """Does the same for the next :meth:`sync_gradients`, which does not count as a step."""
        self._tell(error, is_step=False)

    def _tell(self, error: BaseException, *, is_step: bool) -> None:
        tell(self._engine, error, is_step=is_step)

    def sync_gradients(self) -> None:
        """Sums the gradients of the two copies of each stage; both copies get identical bits.

        Call it on every rank, after the last :meth:`step` of an accumulation. It does nothing if
        stages have one copy. A gradient that is ``None`` on both copies stays ``None``.
        """
        with self._alone("sync_gradients()"):
            self._sum_gradients()

    def _sum_gradients(self) -> None:
        if self._exchanges is not None:
            self._exchanges.sum_gradients(lambda: self._unsummed.warn_if_summed(self.rank))
            self._unsummed.note_sum()

    def synchronize(self) -> None:
        """Waits until the GPUs of all ranks have finished all work issued so far.

        Call it on every rank before relying on results permanently, such as by saving them. With
        ``transport="nccl"`` or ``"copy"``, :meth:`step` returns before the GPU has finished. A
        message that fails after that makes the next call raise, not the step itself, whose results
        are then worthless.

        Raises:
            PipelineError: a message of the last step failed on any rank.
        """
        with self._alone("synchronize()"):
            self._engine.synchronize()

    def mark_gradients_summed(self) -> None:
        """Notes that gradients are summed, for loops that sum all copies of a stage themselves."""
        self._unsummed.note_sum()

    def sync_parameters(self) -> None:
        """Overwrites parameters and buffers of each stage's second copy with those of the first.

        The first copy of stage s is the one on rank s. Called at construction by default.
        """
        if self._exchanges is not None:
            with self._alone("sync_parameters()"):
                self._exchanges.copy()
            self._unsummed.note_copy()

    def check_copies(self) -> None:
        """Raises if any parameter differs in its bits between the two copies of a stage.

        Call it on every rank. Copies normally stay equal: construction makes them so, and both get
        the same gradients. They diverge if only one rank loads or changes weights, or if their
        optimizers have different settings. Saving a checkpoint checks this as well, but only warns.

        Raises:
            ValueError: the copies differ; raised on all ranks, naming the first parameter that
                does.
            PipelineError: another rank does not join within ``config.timeout`` seconds, or is gone.
        """
        if self._local.mirrors is not None:
            modules = dict(zip(self.stages, self.module, strict=True))
            check_copies(self.group, self.config.timeout, modules)

    def sync_buffers(self) -> None:
        """Sets both copies of each floating-point or complex buffer to their mean.

        Other buffers are left alone. This is for the running statistics of batch norms, which each
        copy computes from its own micro-batches. Call it on every rank, before evaluating or
        saving. It does nothing if stages have one copy.
        """
        if self._exchanges is not None:
            with self._alone("sync_buffers()"):
                self._exchanges.average_buffers()

    def swap_with_mirror(self, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Sends tensors to the rank that holds the other copies; returns what that rank sends.

        Call it on every rank of a pipeline whose stages have two copies; a rank may send nothing.

        Args:
            tensors: what to send, of a floating-point dtype.
            like: tensors with the shapes and dtypes of those to be received; values do not matter.

        Raises:
            ValueError: stages have one copy.
        """
        if self._exchanges is None:
            raise ValueError(
                f"{self._local.source.name} has one copy of each stage: there are no mirrors"
            )
        with self._alone("swap_with_mirror()"):
            return self._exchanges.swap(tensors, like)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips the gradients of the whole model by their norm; returns the norm before clipping.

        Every parameter counts once, however many copies it has: the norm is that of the unsplit
        model. Call it on every rank, after gradients are summed. On a GPU, it waits for them.

        Args:
            max_norm: above 0; ``float("inf")`` measures without clipping.
            norm_type: the p of the p-norm, above 0; ``float("inf")`` for the largest absolute
                value.

        Returns:
            The norm, a float64 scalar in host memory, the same on every rank.

        Raises:
            ValueError: ``max_norm`` or ``norm_type`` is not positive, or a gradient is sparse.
            PipelineError: another rank does not join within ``config.timeout`` seconds, or is gone.
        """
        if not max_norm > 0 or not norm_type > 0:
            raise ValueError(
                f"max_norm={max_norm}, norm_type={norm_type}: both must be above 0; "
                f"use float('inf') as max_norm to measure without clipping"
            )
        counted = (
            self._local.mirrors.counted_parameters() if self._local.mirrors else self.parameters()
        )

        def gather(power: Callable[[], float]) -> list[float]:
            def checked_power() -> float:
                self._unsummed.warn_if_clipped(self.rank)
                return power()

            what = "has no norm of its gradients"
            return gather_numbers(self.group, self.config.timeout, checked_power, what)

        norm = total_norm(counted, norm_type, gather)
        clip_local_gradients(self.parameters(), norm, max_norm)
        return norm

    def __getstate__(self) -> dict[str, Any]:
        """Always raises: connections to other ranks cannot be copied or pickled."""
        raise TypeError(
            "a pipeline is connected to other ranks, and can be neither copied nor pickled; copy its "
            "stages, pipeline.module, or save its state_dict()"
        )

    def forward(self, *_: Any, **__: Any) -> Any:
        """Always raises: a pipeline is not called like a module; use :meth:`step`."""
        raise TypeError("a pipeline is not called; use step(), under torch.no_grad() for inference")

    # Hooks

    def register_before_backward_hook(
        self, hook: Callable[[Tensor, int], Tensor | None]
    ) -> RemovableHandle:
        """Registers ``hook(loss, microbatch)``, which may return another loss to differentiate.

        For example, a scaled loss or one with an auxiliary loss added. :meth:`step` still returns
        the losses of the criterion.
        """
        return _register(self._hooks.before_backward, hook)

    def register_after_forward_hook(
        self, hook: Callable[[Tensor, Sequence[Tensor | None], int], None]
    ) -> RemovableHandle:
        """Registers ``hook(loss, outputs, microbatch)``, called once a micro-batch has its loss."""
        return _register(self._hooks.after_forward, hook)

    # What happened

    @property
    def last_trace(self) -> list[TraceEvent]:
        """All computations of the last step on this rank, in order."""
        return self._runner.trace()

    @property
    def times_device(self) -> bool:
        """Whether subsequent steps are timed by the GPU's clock.

        :meth:`stats` and :attr:`last_trace` then wait for the GPU and report what it did. This
        costs two to four events per computation, and always happens while profiling is enabled. On
        a CPU, or if the extension was built without CUDA, only the host's clock is available.
        """
        return self._runner.times_device

    @times_device.setter
    def times_device(self, on: bool) -> None:
        self._runner.times_device = on

    def time_next_step(self) -> None:
        """Times the next training step by the GPU's clock, whatever :attr:`times_device` says."""
        self._runner.times_next = True

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the last training step of all ranks for Perfetto or ``chrome://tracing``.

        Call it on every rank; the first one writes the file. It has one line per rank, showing what
        the rank computed and waited for from the beginning of its own step, and below these the
        plan with F = I = W. On a GPU, the times are the host's unless :attr:`times_device` was set
        before the step.

        Args:
            path: the JSON file to write.

        Raises:
            ValueError: the last step was not a training step, or there was none yet.
            PipelineError: another rank has nothing to write either, or does not join within
                ``config.timeout`` seconds.
        """
        self._runner.save_trace(Path(path), self.config.timeout)

    def stats(self) -> StepStatistics:
        """Returns measured and planned statistics of the last step on this rank.

        Raises:
            ValueError: no step has run yet.
        """
        return self._runner.stats()

    # Construction

    def _adopt(self, modules: list[nn.Module], schedule: str | Schedule) -> dict[str, Any]:
        """Checks and adopts the modules; returns what the other ranks must know."""
        if not isinstance(self.batch_dim, int) or isinstance(self.batch_dim, bool):
            raise TypeError(
                f"batch_dim={self.batch_dim!r}: it must be an int (a configuration is given by "
                f"name, config=)"
            )
        self._local = LocalStages(modules, schedule, self.group, self.config)
        self.module = nn.ModuleList(self._local.modules)
        told = {"rank_mapping": list(self.group.rank_mapping), "batch_dim": self.batch_dim}
        return told | self._local.describe()

    def _settle(self, offers: Sequence[Offer]) -> None:
        """Chooses the transport, the same on all ranks, and connects the ranks."""
        transport, reason = choose_transport(offers)
        if transport != "host" or reason:  # only then is there anything that can fail
            collect(
                self.group,
                self.config.timeout,
                lambda: self._local.use_transport(transport, reason),
                _FAILURE,
            )
        self.group.connect(self.config.timeout)

    def _make_engine(self) -> None:
        local = self._local
        self._engine = self.group.make_engine(
            EngineSettings(local.peers(), self.config.timeout, local.gpu)
        )
        self._runner = StepRunner(self._engine, local, self.group)
        self._exchanges: MirrorExchanges | None = None
        if local.mirrors is not None:
            self._exchanges = MirrorExchanges(
                self._engine, local.mirrors, local.stages, self.config.bucket_bytes
            )
        clock_by_gpu(self._engine, local.device)

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
        if self.config.memory_optimization != "none":
            save_where_compiled(self._local.modules)
        modules = dict(zip(self.stages, self.module, strict=True))
        seed, number, device = self.config.seed or 0, self._num_steps, self._local.device

        def reseed(stage: int, microbatch: int) -> None:
            seed_generators(device, microbatch_seed(seed, number, stage, microbatch))

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
            reseed=None if self.config.seed is None else reseed,
            overlapped_function=self._local.overlapped.function,
        )


def _register(hooks: dict[int, Any], hook: Callable[..., Any]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
