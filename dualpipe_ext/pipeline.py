"""Pipelines: the modules of one rank, and the steps that run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualpipe_ext import _C
from dualpipe_ext._advice import warn_caller
from dualpipe_ext._batch import check_num_chunks, cut_batch
from dualpipe_ext._C import InternalError, PipelineError
from dualpipe_ext._cuda import shapes_digest
from dualpipe_ext._handshake import agree
from dualpipe_ext._mirrors import MirroredStages, describe_stage
from dualpipe_ext._overlap import find_overlapped
from dualpipe_ext._plans import PlannedStep, StepPlanner
from dualpipe_ext._source import ScheduleSource
from dualpipe_ext._step import Criterion, LossHooks, Step, microbatch_seed
from dualpipe_ext._transport import EngineSettings, gpu_settings
from dualpipe_ext.config import DualPipeConfig
from dualpipe_ext.gradients import clip_local_gradients, total_norm
from dualpipe_ext.groups import PipelineGroup, resolve_group
from dualpipe_ext.microbatches import Joined
from dualpipe_ext.schedule import Schedule
from dualpipe_ext.stats import StepStatistics, TraceEvent
from dualpipe_ext.weight_grad import (
    WeightSplitReport,
    defer_weight_gradients,
    undo_defer_weight_gradients,
    weight_split,
)

__all__ = ["Pipeline"]


class Pipeline(nn.Module):
    """Stage modules of one rank, run by any schedule on the native engine.

    Every rank of the group makes one, with the modules of its own stages (:attr:`stages`), and
    calls :meth:`step`. Stages return a tensor, or a tuple of tensors and ``None`` of any dtype,
    which is what the next stage is called with.

    Args:
        modules: this rank's stages, in the order of :attr:`stages`.
        schedule: a name of ``dualpipe_ext.schedule.schedules()``, or a schedule of one's own.
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
        schedule: str | Schedule = "dualpipe",
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | PipelineGroup | None = None,
        rank_mapping: Sequence[int] | None = None,
        *,
        config: DualPipeConfig | None = None,
    ) -> None:
        super().__init__()
        self.batch_dim = batch_dim
        self.config = config or DualPipeConfig()
        self.group = resolve_group(process_group, rank_mapping)
        self.rank = self.group.rank
        self.num_ranks = self.group.size
        agree(self.group, self.config.timeout, lambda: self._adopt(list(modules), schedule))
        self._hooks = LossHooks()
        self._planner = StepPlanner(
            self._source, self.rank, self.config.lookahead, self._overlapped.function is not None
        )
        self._last_plan: PlannedStep | None = None
        self._num_steps = 0
        self._running = False
        self._unsummed: int | None = None  # MirroredStages.num_changes() after a step, until a sum
        self._has_warned_of_sum = False
        self._engine = self.group.make_engine(
            EngineSettings(self._peers(), self.config.timeout, self._gpu)
        )
        if self._gpu is not None:
            self._engine.connect()
        if self.config.mirror_init == "broadcast":
            self.sync_parameters()

    # What this rank is

    @property
    def stages(self) -> list[int]:
        """The stages that this rank holds, in the order of its modules."""
        return list(self._stages)

    @property
    def num_stages(self) -> int:
        """The stages of the whole model."""
        return self._num_stages

    @property
    def is_mirrored(self) -> bool:
        """Whether every stage has two copies, on ranks r and P-1-r."""
        return self._mirrors is not None

    @property
    def weight_split(self) -> WeightSplitReport:
        """Which weight gradients the schedule's W computes, and which ones are computed in I.

        Empty where the configuration does not split them.
        """
        return self._weight_split

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
        Gradients accumulate in ``.grad`` (or ``main_grad``), as with ``loss.backward()`` for every
        micro-batch.

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
            sync_gradients: sum the gradients of the two copies of each stage within the step,
                hidden in its cool-down. Otherwise call :meth:`sync_gradients` before the optimizer.

        Returns:
            ``(loss, outputs)``. ``loss`` holds the losses of the micro-batches that leave on this
            rank, shape ``[number of these]``; ``None`` on other ranks and without a criterion.
            ``outputs`` has the whole of them along ``batch_dim`` (as a list of pieces where they do
            not fit together), a tuple where there are several, or is ``None``.

        Raises:
            ValueError, TypeError: a mistake on this rank: sizes, inputs, labels, criterion.
            PipelineError: a stage raised (the cause is chained), or another rank failed. The step
                failed on every rank; gradients are undefined; the next step works.
        """
        if self._running:
            raise ValueError(
                "step() was called within a step, from a stage, criterion or hook; call it after "
                "the step has returned"
            )
        self._num_steps += 1
        training = torch.is_grad_enabled()
        num_chunks = num_chunks or self.config.num_microbatches
        try:
            check_num_chunks(num_chunks)
            if training:
                self._warn_of_missing_sum()
            plan = self._planner.plan(num_chunks, training, sync_gradients)
            step = self._make_step(plan, inputs, labels, criterion, training, return_outputs)
            reducer = self._gradient_sum() if sync_gradients and training else None
        except BaseException as error:  # whatever it is, the other ranks must not wait for this one
            self._engine.fail(f"{type(error).__name__}: {error}")
            raise
        self._last_plan = plan
        self._run(plan, step, reducer)
        if training and self._mirrors is not None:
            self._unsummed = None if sync_gradients else self._mirrors.num_changes()
        return step.loss(), step.gathered_outputs()

    def sync_gradients(self) -> None:
        """Sums the gradients of the two copies of each stage; both copies get the same bits.

        Call it after the last :meth:`step` of an accumulation, on every rank. Nothing happens
        where stages have one copy. A gradient that is ``None`` on both copies stays so.
        """
        exchange = self._gradient_sum()
        if exchange is not None:
            self._engine.exchange(exchange, sorted(self._stages))
            self._unsummed = None

    def sync_parameters(self) -> None:
        """Overwrites parameters and buffers of each stage's second copy with those of the first.

        The first copy of stage s is that on rank s. Called at construction by default.
        """
        if self._mirrors is not None:
            exchange = self._mirrors.copy(self._engine, self.config.bucket_bytes)
            self._engine.exchange(exchange, sorted(self._stages))
            self._unsummed = None

    def sync_buffers(self) -> None:
        """Gives both copies of each floating-point buffer their mean; others stay as they are.

        For running statistics of batch norms, which each copy takes of its own micro-batches. Call
        it on every rank, before evaluating or saving. Nothing happens where stages have one copy.
        """
        if self._mirrors is not None:
            self._mirrors.average_buffers(self._engine, self.config.bucket_bytes, self._stages)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips the gradients of the whole model by their norm; returns the norm before.

        Every parameter counts once, however many copies it has: the norm is that of the unsplit
        model. Call it on every rank, after gradients are in sync.

        Raises:
            ValueError: ``max_norm`` or ``norm_type`` is not positive.
        """
        if not max_norm > 0 or not norm_type > 0:
            raise ValueError(
                f"max_norm={max_norm}, norm_type={norm_type}: both must be above 0; "
                f"use float('inf') as max_norm to measure without clipping"
            )
        counted = self._mirrors.counted_parameters() if self._mirrors else self.parameters()
        norm = total_norm(counted, norm_type, self.group.all_gather_floats)
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
        return [
            TraceEvent(action, start * 1e-9, end * 1e-9, wait * 1e-9)
            for action, start, end, wait in self._engine.trace_events
        ]

    def stats(self) -> StepStatistics:
        """The last step on this rank, measured and planned.

        Raises:
            ValueError: no step was run yet.
        """
        if self._last_plan is None:
            raise ValueError("there are no statistics before the first step()")
        engine, plan = self._engine, self._last_plan
        return StepStatistics(
            step_seconds=engine.step_ns * 1e-9,
            busy_seconds=engine.busy_ns * 1e-9,
            measured_bubble=1.0 - engine.busy_ns / max(engine.step_ns, 1),
            planned_bubble=plan.planned_bubble,
            peak_live_activations=engine.peak_live_activations,
            planned_peak_activations=plan.program.planned_peak_activations,
        )

    # Construction

    def _adopt(self, modules: list[nn.Module], schedule: str | Schedule) -> dict[str, Any]:
        """Checks and takes the modules; returns what must be equal on all ranks."""
        self._source = ScheduleSource.of(schedule, self.num_ranks, len(modules))
        layout = self._source.smallest()
        self._num_stages = layout.num_stages
        self._stages = layout.stages_of(self.rank)
        self._check_modules(modules)
        self.module = nn.ModuleList(modules)
        self._overlapped = find_overlapped(modules if self.config.use_overlapped else [])
        if not self.config.split_weight_gradients:
            undo_defer_weight_gradients(self.module)
            self._weight_split = weight_split(nn.ModuleList())
        else:
            self._weight_split = defer_weight_gradients(self.module)
        mirrored = layout.mirror_of(self.rank) is not None
        self._mirrors = (
            MirroredStages(self.rank, self.num_ranks, self._stages, modules) if mirrored else None
        )
        program = _C.Program(layout.lower().native, self.rank, "")
        self._gpu = gpu_settings(self.config, self._device(), program.message_ways)
        self._warn_of_what_is_unusual()
        with_values = self.config.mirror_init == "check"
        described = {
            str(stage): describe_stage(module, with_values=with_values)
            for stage, module in zip(self._stages, modules, strict=True)
        }
        return {
            "version": _C.version,
            "torch": torch.__version__,
            "ranks": self.num_ranks,
            "schedule name": self._source.name,
            "schedule": f"{layout.placement} placement, {layout.num_stages} stages, "
            f"digest {layout.digest():016x}",
            "config": repr(self.config),
            "batch_dim": self.batch_dim,
            "overlapped": self._overlapped.function is not None,
            "stages": described if mirrored else {},
        }

    def _check_modules(self, modules: Sequence[nn.Module]) -> None:
        for module in modules:
            if not isinstance(module, nn.Module):
                raise TypeError(f"modules must be nn.Modules; found a {type(module).__name__}")
        if len(modules) != len(self._stages):
            raise ValueError(
                f"{len(modules)} modules were given; {self._source.name} on {self.num_ranks} ranks "
                f"needs {len(self._stages)} on rank {self.rank}: those of stages {self._stages}"
            )
        if len({id(module) for module in modules}) < len(modules):
            raise ValueError(
                f"the same module was given twice; rank {self.rank} needs two different ones, "
                f"those of stages {self._stages}"
            )

    def _warn_of_what_is_unusual(self) -> None:
        if self._overlapped.problem:
            warn_caller(
                f"rank {self.rank}: {self._overlapped.problem}; forward and backward of a pair "
                f"run one after the other"
            )
        if self.config.seed is not None and self.group.are_threads:
            warn_caller(
                f"rank {self.rank}: seed={self.config.seed} cannot hold for ranks that are threads: "
                f"they share torch's one generator; use processes"
            )
        drifting = self._mirrors.drifting_buffers() if self._mirrors else []
        if drifting:
            more = f" and {len(drifting) - 1} more" if len(drifting) > 1 else ""
            warn_caller(
                f"rank {self.rank}: {drifting[0]}{more} will differ between the two copies of the "
                f"stage, for each sees its own half of the batch; call sync_buffers() before "
                f"evaluating or saving, or use a norm without running statistics"
            )

    def _peers(self) -> list[int]:
        neighbours = {(self.rank - 1) % self.num_ranks, (self.rank + 1) % self.num_ranks}
        if self.is_mirrored:
            neighbours.add(self.num_ranks - 1 - self.rank)
        return sorted(neighbours - {self.rank})

    # One step

    def _warn_of_missing_sum(self) -> None:
        """Where parameters were changed by the gradients of one copy alone; once a pipeline."""
        if self._mirrors is None or self._unsummed is None or self._has_warned_of_sum:
            return
        if self._mirrors.num_changes() != self._unsummed:
            self._has_warned_of_sum = True
            warn_caller(
                f"rank {self.rank}: parameters were changed after a step() whose gradients were "
                f"not summed over the two copies of each stage, so the copies train apart, each on "
                f"half of the batch; call sync_gradients() before the optimizer, or "
                f"step(..., sync_gradients=True). If you sum gradients yourself, silence this with "
                f'warnings.filterwarnings("ignore", message="rank .*: parameters were changed")'
            )

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
        number = self._num_steps
        seed = self.config.seed
        return Step(
            modules=dict(zip(self._stages, self.module, strict=True)),
            last_stage=self._num_stages - 1,
            inputs=cut_batch(inputs, plan.batch.entering, self.batch_dim, "inputs"),
            labels=cut_batch(labels or (), plan.batch.leaving, self.batch_dim, "labels"),
            criterion=criterion,
            hooks=self._hooks,
            batch_dim=self.batch_dim,
            training=training,
            keep_outputs=return_outputs,
            seed=None if seed is None else lambda s, m: microbatch_seed(seed, number, s, m),
            overlapped_function=self._overlapped.function,
        )

    def _run(self, plan: PlannedStep, step: Step, reducer: _C.MirrorExchange | None) -> None:
        self._running = True
        try:
            self._engine.run(
                plan.program,
                step,
                training=step.training,
                keep_outputs=step.overlapped_function is not None,
                device=str(self._device()),
                reducer=reducer,
                shapes=self._shapes(step),
            )
        except BaseException as error:
            if _is_the_stages(error, step):
                text = f"{self._engine.failure}\n\n{self._where(plan)}"
                raise PipelineError(text) from error
            if isinstance(error, PipelineError):
                raise PipelineError(f"{error}\n\n{self._where(plan)}") from None
            raise
        finally:
            self._running = False

    def _where(self, plan: PlannedStep) -> str:
        """The schedule around the action at which this rank stopped."""
        return plan.lowered.grid(self.rank, self._engine.cursor)

    def _gradient_sum(self) -> _C.MirrorExchange | None:
        if self._mirrors is None:
            return None
        return self._mirrors.gradient_sum(self._engine, self.config.bucket_bytes)

    def _shapes(self, step: Step) -> int:
        """What ranks agree on where messages are described in the first step of a kind alone."""
        return 0 if self._gpu is None else shapes_digest(self.rank, list(step.inputs.values()))

    def _device(self) -> torch.device:
        for parameter in self.parameters():
            return parameter.device
        return torch.device("cpu")


def _is_the_stages(error: BaseException, step: Step) -> bool:
    """Whether a stage failed, rather than the caller or this library."""
    if not isinstance(error, Exception) or isinstance(error, InternalError):
        return False
    if error is step.mistake:
        return False
    ours = isinstance(error, (ValueError, TypeError, PipelineError))
    return error is step.error or not ours or _was_raised_in_python(error)


def _was_raised_in_python(error: BaseException) -> bool:
    """Whether code of the user's raised it below the engine: in a backward or a hook of torch's.

    What the engine itself raises has the frame that called it, and no other.
    """
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None


def _register(hooks: dict[int, Any], hook: Callable[..., Any]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
