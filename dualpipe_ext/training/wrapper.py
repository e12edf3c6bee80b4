"""Training loops over a pipeline: a step for each batch, with the results of the unsplit model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualpipe_ext._handshake import act_together, agree
from dualpipe_ext._sharded import check_whole
from dualpipe_ext.checkpoint import Resumed, load_checkpoint, save_checkpoint
from dualpipe_ext.config import DualPipeConfig
from dualpipe_ext.groups import PipelineGroup, resolve_group
from dualpipe_ext.training.accumulation import Accumulation
from dualpipe_ext.training.batches import Batch, BatchReader, in_step, is_batch
from dualpipe_ext.training.building import build_pipeline
from dualpipe_ext.training.cutting import OwnPart
from dualpipe_ext.training.losses import IGNORED, LossFunction, Reduction, choose_loss
from dualpipe_ext.training.modes import evaluating
from dualpipe_ext.training.optimizers import (
    MakeOptimizer,
    MakeScheduler,
    Recipe,
    stage_options,
)
from dualpipe_ext.training.options import LoopOptions
from dualpipe_ext.training.outputs import Outputs, first_rows, join_ends
from dualpipe_ext.training.parts import Part
from dualpipe_ext.training.replicas import Replicas, split_mesh
from dualpipe_ext.training.reports import Report
from dualpipe_ext.training.setup import input_names, place_stages, predicts_next_token
from dualpipe_ext.training.side_by_side import StepsSideBySide
from dualpipe_ext.training.steps import BatchSteps
from dualpipe_ext.training.updates import Updater, make_updater

__all__ = ["TrainingWrapper"]


class TrainingWrapper:
    """Trains a model over a pipeline, with the losses and parameters of training it in one piece.

    Every rank constructs one alike, and calls :meth:`train_step`, :meth:`evaluate` and
    :meth:`predict` with the same batches. A batch is a tensor, a tuple ``(input, ..., labels)``, a
    pair of tuples, or a mapping by the names of the model's inputs and of the labels. Its rows are
    split into ``config.num_microbatches``; if they do not divide evenly, the first micro-batches
    have one row more. Each micro-batch is weighted by what is in it, so that losses and gradients
    are those of the whole batch. The model and ``loss_fn`` must treat rows independently: a batch
    norm, or a loss that compares rows, sees only one micro-batch.

    Args:
        model: a whole model, which its adapter cuts: this rank trains its own partitions, which
            share their parameters with the model. Or all partitions that an adapter made of a
            model; or the stages of this rank, in the order of a pipeline's modules.
        config: must be the same on every rank; its ``schedule`` and ``num_stages`` say how to cut.
        optimizer: a class, or a function of a list of parameters, that makes this rank's optimizer
            (by default AdamW, with its own default settings); or an optimizer of the whole model's
            parameters, which is changed to hold only this rank's. With ``None``,
            :meth:`train_step` cannot be called.
        optimizer_options: further arguments of the class or function.
        scheduler: a learning rate scheduler, likewise, made from the optimizer. It steps after the
            optimizer.
        scheduler_options: further arguments of its class or function.
        loss_fn: ``loss_fn(*outputs, *labels)`` returns the scalar loss of some rows; it must not
            have parameters of its own. By default, the cross-entropy over tokens; of the next token
            for causal language models of Hugging Face.
        reduction: what ``loss_fn`` returns, and what the loss of a batch is: the ``"mean"`` over
            rows, their ``"sum"``, or ``"token"``, the mean over all labels other than
            ``ignore_index`` in all micro-batches.
        ignore_index: the label of positions that do not count.
        shifts_labels: whether the loss compares each position with the next label, and thus leaves
            out the first label of each row, which ``"token"`` then does not count. State it for a
            ``loss_fn`` of your own whose labels have a time dimension.
        max_grad_norm: the norm to which gradients of the whole model are clipped.
        accumulation_steps: the number of batches per optimizer step. The gradient is that of one
            batch made of all of them.
        scaler: scales losses for float16. If any rank finds a gradient that is not finite, all
            ranks skip the step, and the scheduler does not step either.
        autocast: the dtype of autocast around forwards and losses.
        device: where to move this rank's stages; by default they stay where they are. Required for
            a model on the meta device, whose values :meth:`load_checkpoint` provides.
        input_names: the names of what the first stage takes, for batches by name if stages are your
            own.
        label_names: which entries of a batch by name are labels, in the order of ``loss_fn``.
        sample_inputs: one micro-batch of the model's inputs, for a ``config.balance`` that measures
            layers; adapters of Hugging Face models can make one up.
        batch_dim: the dimension of the rows, 0 or more.
        process_group: the ranks, as for :class:`~dualpipe_ext.Pipeline`.
        replica_group: the ranks at the same position of other pipelines (replicas). Each replica is
            given its own part of the batch, on all of its ranks (:class:`~dualpipe_ext.training.
            ReplicaBatchSampler`). Losses and gradients are those of the whole batch.
        mesh: a mesh with axes ``"pp"`` and ``"dp"``, instead of both groups.

    Attributes:
        pipeline: the pipeline that runs the steps.

    Raises:
        ValueError: an unsuitable model, group or option.
        TypeError: an argument of the wrong type.
        PipelineError: another rank could not be constructed.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        config: DualPipeConfig | None = None,
        optimizer: MakeOptimizer | Optimizer | None = AdamW,
        *,
        optimizer_options: Mapping[str, Any] | None = None,
        scheduler: MakeScheduler | LRScheduler | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        loss_fn: LossFunction | None = None,
        reduction: Reduction | None = None,
        ignore_index: int = IGNORED,
        shifts_labels: bool | None = None,
        max_grad_norm: float | None = None,
        accumulation_steps: int = 1,
        scaler: GradScaler | None = None,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        input_names: Sequence[str] | None = None,
        label_names: Sequence[str] = ("labels",),
        sample_inputs: Sequence[Tensor | None] | None = None,
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | PipelineGroup | None = None,
        replica_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.config = config or DualPipeConfig()
        if mesh is not None:
            process_group, replica_group = split_mesh(mesh, process_group, replica_group)
        self._group = resolve_group(process_group, None)
        self._options = LoopOptions(
            loss_fn=loss_fn,
            reduction=reduction,
            ignore_index=ignore_index,
            shifts_labels=shifts_labels,
            max_grad_norm=max_grad_norm,
            accumulation_steps=accumulation_steps,
            autocast=autocast,
            input_names=None if input_names is None else tuple(input_names),
            label_names=tuple(label_names),
            batch_dim=batch_dim,
        )
        self._replicas = Replicas(replica_group)
        self.pipeline = build_pipeline(
            model,
            self.config,
            self._group,
            self._replicas,
            check=lambda: self._check(model),
            adopt=lambda part: self._adopt(part, device),
            sample_inputs=sample_inputs,
            batch_dim=batch_dim,
        )
        self._steps = BatchSteps(self.pipeline, self._rows, batch_dim, self.config.timeout)
        self._side_by_side = StepsSideBySide(self.pipeline, self._replicas)
        self._updater: Updater | None = None
        self._is_torn = False  # True during an update, and after one that failed
        recipes = Recipe(optimizer, optimizer_options), Recipe(scheduler, scheduler_options)
        self._replicas.together(
            lambda: agree(self._group, self.config.timeout, lambda: self._equip(*recipes, scaler))
        )

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of this rank's parameters.

        Raises:
            ValueError: there is none.
        """
        return self._trained_by.optimizer

    @property
    def scheduler(self) -> LRScheduler | None:
        """The scheduler of the optimizer, if there is one."""
        return self._trained_by.scheduler

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the whole model's gradient before it was last clipped."""
        return self._trained_by.grad_norm

    @property
    def num_updates(self) -> int:
        """The number of optimizer steps so far, without those that a scaler skipped."""
        return self._trained_by.num_updates

    def train_step(self, batch: Any, *, halves: bool = False, update: bool | None = None) -> Tensor:
        """Trains on a batch: forward, backward and, every ``accumulation_steps``, an update.

        Args:
            batch: the same on every rank, with at least as many rows as micro-batches. It may be in
                host memory.
            halves: every rank is given only its own part: the inputs of the rows that enter there,
                and the labels of those that leave (:meth:`own_rows`); ``None`` if there are none.
            update: whether to update now, to make an accumulation shorter or longer.

        Returns:
            The loss of the batch, a float64 scalar in host memory, the same on every rank.

        Raises:
            ValueError, TypeError: a batch that does not fit the model or cannot be split, ranks
                with different batches, or no optimizer.
            PipelineError: a stage raised, or another rank failed. Accumulated gradients are
                discarded; the next step works.
            Exception: what the optimizer or scheduler raised on this rank; the others raise a
                ``PipelineError``. Parameters may have been updated on only some ranks, so no
                further step is possible before :meth:`load_checkpoint`.
        """
        updater = self._trained_by
        with self._replicas.telling_failures():
            try:
                self._refuse_torn()
            except ValueError as error:  # an interrupt may have torn only this rank
                self.pipeline.abandon_step(error)
                raise
        try:
            part, units = self._side_by_side.ready(
                lambda: self._part(batch, halves, fill=False),
                lambda _, total: self._loss.check(total),
            )
            total = self._accumulation.add(units, updater.grads())
            is_last = self._accumulation.is_complete if update is None else update
            loss = self._side_by_side.run(lambda sums: self._run(part, total, sums), is_last)
            loss *= self._loss.share(total) / self._loss.share(units)
            can_step = updater.can_step() if is_last else True
            report = self._side_by_side.summarize(Report(loss, part.fingerprint, can_step))
            whole = self._accumulation.add_loss(report.loss, units)
            if is_last:
                self._update(updater, replace(report, loss=whole))
        except BaseException:
            updater.discard()
            self._accumulation.restart()
            raise
        if is_last:
            self._accumulation.restart()
        self._steps.tell_of_imbalance()
        return torch.tensor(report.loss, dtype=torch.float64)

    def evaluate(self, data: Any, *, halves: bool = False) -> Tensor:
        """Returns the loss of a batch, or of all batches of an iterable as if they were one.

        Runs in evaluation mode and without gradients, and restores modes afterwards. A batch may
        have fewer rows than micro-batches: rows that do not count are added.

        Args:
            data: a batch, or an iterable of batches, the same on every rank. A list is a batch if
                it holds tensors; of lists or tuples, it is an iterable of batches.
            halves: as for :meth:`train_step`; no rows are added then.

        Returns:
            The loss, a float64 scalar in host memory, the same on every rank.

        Raises:
            ValueError, TypeError, PipelineError: as :meth:`train_step` does; or there is no batch.
        """
        loss, units, mark = 0.0, 0, 0.0
        self._replicas.average_buffers(self.pipeline)
        with evaluating(self._stages), self._replicas.telling_failures():
            whole = is_batch(data) or data is None
            for batch in [data] if whole else in_step(data, self._group, self.config.timeout):
                part = self._part(batch, halves, fill=not halves)
                loss += self._run(part, part.total or 1) * self._loss.share(part.total)
                units += part.total
                mark = (31.0 * mark + part.fingerprint) % 2.0**40
        self._side_by_side.settle()
        report = self._side_by_side.summarize(Report(loss, mark))
        total = int(sum(self._replicas.gather(units)))
        if total == 0:
            raise ValueError("there is no batch to evaluate, or none with a label that counts")
        return torch.tensor(report.loss / self._loss.share(total), dtype=torch.float64)

    def predict(self, batch: Any) -> Outputs:
        """Returns the model's outputs for a batch, in evaluation mode and without gradients.

        Args:
            batch: as for :meth:`evaluate`, the same on every rank of a replica; all replicas call
                this, but may have different batches. Labels are ignored. Inputs without labels are
                a tensor, a mapping, or a pair ``((input, ...), ())``.

        Returns:
            The outputs of all rows, a tuple if there are several, on the ranks where micro-batches
            leave (DualPipe: the first and the last); ``None`` elsewhere.

        Raises:
            ValueError, TypeError, PipelineError: as :meth:`train_step` does; or the outputs of
                micro-batches cannot be joined.
        """
        self._replicas.average_buffers(self.pipeline)
        with evaluating(self._stages):
            part, own = self._replicas.together(lambda: self._infer(batch))
        self._side_by_side.settle()
        self._side_by_side.summarize(Report(0.0, part.fingerprint))
        outputs = join_ends(self.pipeline, own, self.config.timeout)
        return first_rows(outputs, part.total, self._options.batch_dim)

    def own_rows(self, rows: int) -> tuple[range, range]:
        """Returns which rows of a batch of ``rows`` enter on this rank, and which leave here.

        For loaders that read only what ``halves=True`` requires: the inputs of the former and the
        labels of the latter.
        """
        rank = self._group.rank
        return self._rows.entering_rows(rank, rows), self._rows.leaving_rows(rank, rows)

    def save_checkpoint(
        self,
        folder: str | os.PathLike[str],
        *,
        extra: Any = None,
        keep: int | None = None,
    ) -> Path:
        """Saves everything needed to continue training, on any number of ranks; all ranks call it.

        Args:
            folder: the folder of this run's checkpoints, on a file system that all ranks share.
            extra: anything else to save and restore, such as the position in the data.
            keep: how many of the latest checkpoints to keep; by default all.

        Returns:
            The path of the checkpoint: ``folder/step-<num_updates>``.

        Raises:
            ValueError: in the middle of an accumulation, as gradients are not saved; or after an
                update that failed.
            Exception: what went wrong on this rank.
            PipelineError: another rank could not save, with its reason.
        """
        updater = self._trained_by
        self._replicas.together(self._meet_to_save, "could not save the checkpoint")
        return save_checkpoint(
            folder,
            self.pipeline,
            updater.optimizer,
            updater.scheduler,
            scaler=updater.scaler,
            step=updater.num_updates,
            extra=extra,
            keep=keep,
            replicas=self._replicas.group,
        )

    def load_checkpoint(self, path: str | os.PathLike[str]) -> Resumed:
        """Continues from a checkpoint, or from the latest one in a folder; all ranks call it.

        Without an optimizer, only the model is loaded.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint does not fit, on every rank; or it is damaged, on the ranks
                that find so.
            PipelineError: another rank could not load, with its reason.
        """
        updater = self._updater
        if updater is None:
            return load_checkpoint(path, self.pipeline, replicas=self._replicas.group)
        resumed = load_checkpoint(
            path,
            self.pipeline,
            updater.optimizer,
            updater.scheduler,
            scaler=updater.scaler,
            replicas=self._replicas.group,
        )
        updater.discard()
        updater.num_updates = resumed.step
        self._accumulation.restart()
        self._is_torn = False
        return resumed

    # Construction

    def _check(self, model: nn.Module | Sequence[nn.Module]) -> None:
        self._options.check()
        given = model if isinstance(model, Sequence) else [model]
        for module in (each for each in given if isinstance(each, nn.Module)):
            check_whole(
                module,
                "TrainingWrapper, which sums gradients over replicas by itself, trains whole models",
                "train its stages over a Pipeline with a loop of your own, or do not shard it",
            )

    def _adopt(
        self, part: OwnPart, device: torch.device | str | None
    ) -> tuple[Sequence[nn.Module], dict[str, Any]]:
        """Does what else may fail on one rank; returns its stages and what ranks compare."""
        options = self._options
        self._rows, stages = part.rows, part.stages
        self._loss = choose_loss(
            predicts_next_token(stages),
            options.loss_fn,
            options.reduction,
            options.ignore_index,
            options.shifts_labels,
        )
        self._accumulation = Accumulation(
            options.accumulation_steps, is_mean=self._loss.reduction != "sum"
        )
        self._stages = place_stages(stages, device)
        self._reader = BatchReader(options.input_names or input_names(stages), options.label_names)
        return self._stages, options.to_compare()

    def _equip(
        self, optimizer: Recipe, scheduler: Recipe, scaler: GradScaler | None
    ) -> dict[str, Any]:
        """Makes optimizer and scheduler, if there are any; returns what ranks compare."""
        if optimizer.given is None:
            scales = scaler is not None and scaler.is_enabled()
            if optimizer.options or scheduler.given or scheduler.options or scales:
                raise ValueError(
                    "optimizer=None, and options, a scheduler or a scaler for one: give an optimizer "
                    "as well, or none of them"
                )
            return {"scaler": False, "optimizer": None, "stages": {}}
        self._updater = make_updater(
            self.pipeline,
            self._steps.device,
            optimizer,
            scheduler,
            scaler,
            self._options.max_grad_norm,
        )
        name = type(self._updater.optimizer).__name__
        options = stage_options(self._updater.optimizer, self.pipeline)
        return {"scaler": self._updater.scaler is not None, "optimizer": name, "stages": options}

    # Steps

    def _refuse_torn(self) -> None:
        """Raises if an update has failed, after which ranks may differ in their parameters."""
        if self._is_torn:
            raise ValueError(
                "an update has failed, and some ranks may have parameters that others have not: "
                "load_checkpoint() first"
            )

    def _meet_to_save(self) -> None:
        self.pipeline.synchronize()  # ends at once where another rank does something else
        failure = "could not save the checkpoint"
        act_together(self._group, self.config.timeout, self._check_can_save, failure=failure)

    def _check_can_save(self) -> None:
        self._refuse_torn()  # which an interrupt may have left untrue on this rank alone
        if self._accumulation.num_batches:
            raise ValueError(
                f"{self._accumulation.num_batches} batches were accumulated since the last update, "
                f"and gradients are not saved; save after train_step(batch, update=True)"
            )

    @property
    def _trained_by(self) -> Updater:
        if self._updater is None:
            raise ValueError(
                "there is no optimizer; give one to TrainingWrapper, such as "
                "optimizer=lambda parameters: AdamW(parameters, lr=1e-3)"
            )
        return self._updater

    def _update(self, updater: Updater, report: Report) -> None:
        """Updates parameters on all ranks; if one cannot, the others raise as well."""
        failure = "could not update its parameters"
        together = partial(act_together, self._group, self.config.timeout, failure=failure)
        self._is_torn = True
        self._replicas.together(lambda: updater.run(report.loss, report.are_finite, together))
        self._is_torn = False

    def _part(self, given: Any, halves: bool, fill: bool) -> Part:
        """Returns this rank's part of a batch."""
        if halves:
            return self._steps.of_halves(lambda: self._read_half(given), self._loss)
        return self._steps.of_whole(lambda: self._reader.read(given), self._loss, fill)

    def _read_half(self, given: Any) -> Batch:
        return Batch((), ()) if given is None else self._reader.read(given, partly=True)

    def _infer(self, batch: Any) -> tuple[Part, Any]:
        """Returns this rank's part of a batch, and the outputs of the rows that leave here."""
        part = self._steps.of_inputs(lambda: self._reader.read_inputs(batch))
        return part, self._steps.infer(part, self._options.autocast)

    def _run(self, part: Part, total: int, sync_gradients: bool = False) -> float:
        """Runs a step; returns this rank's share of the loss, for which ``total`` units weigh 1."""
        autocast = self._options.autocast
        loss, _ = self._steps.run(
            part, self._loss, total, autocast=autocast, sync_gradients=sync_gradients
        )
        return loss
