"""A ``transformers.Trainer`` that trains over a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Trainer, TrainingArguments

from dualpipe_ext._ranks import Ranks
from dualpipe_ext.compat.batches import BatchPipeline
from dualpipe_ext.compat.huggingface.arguments import accepted, recomputes
from dualpipe_ext.compat.huggingface.checkpoints import last_complete_checkpoint
from dualpipe_ext.compat.huggingface.losses import ModelLoss
from dualpipe_ext.compat.huggingface.one_process import show_one_process
from dualpipe_ext.compat.ranks import (
    TrainerRanks,
    rank_device,
    through_together,
    update_together,
)
from dualpipe_ext.compat.whole import own_state_alone, refuse_shards, update_model, whole_state
from dualpipe_ext.config import DualPipeConfig

__all__ = ["DualPipeTrainer"]


class DualPipeTrainer(Trainer):  # type: ignore[misc]  # transformers may not be there to check
    """A ``transformers.Trainer`` over a pipeline, with the losses of a run on one process.

    Start it alike on every rank (``torchrun``, or processes of :func:`dualpipe_ext.testing.
    run_ranks`): all ranks read the same batches and keep the same state; the first one logs and
    writes. ``per_device_train_batch_size`` is the batch size of all ranks together. Replicas, if
    there are any, divide its rows among themselves, and each splits its own into ``num_chunks``
    micro-batches; the results are those of one process, whatever the number of replicas. Data,
    collators, callbacks, optimizers, schedulers, logs and checkpoints are the trainer's own. A
    checkpoint is that of an unsplit run: either kind of run can continue from the other's. The loss
    is the model's own ``loss_function``.

    During training, ``model`` on each rank has current values of only this rank's stages;
    :meth:`save_model` and the end of :meth:`train` give it all of them.

    accelerate sees only one process, and does so for the lifetime of this process. Random numbers
    of dropout depend on ``args.seed`` and the number of the batch, so that a resumed run draws the
    same as an uninterrupted one.

    Args:
        model: a transformers model with a head, and with an adapter.
        args: training arguments; what cannot be honoured is refused (:data:`REFUSED` in
            ``compat.huggingface.arguments``). ``activation_checkpointing`` (in older releases
            ``gradient_checkpointing``) recomputes stages.
        num_chunks: the number of micro-batches of each pipeline; even, and at least twice the
            number of its ranks.
        enable_profiling: log the pipeline's times and its bubble whenever losses are logged.
        config: all other settings of the pipeline.
        process_group: the ranks of this pipeline; by default torch's default group.
        replica_group: the ranks at the same position of other pipelines (replicas); as for
            :class:`dualpipe_ext.TrainingWrapper`.
        mesh: a mesh with axes ``"pp"`` and ``"dp"``, instead of both groups.
        more: further arguments of the trainer: datasets, collator, callbacks, metrics, optimizers.

    Attributes:
        pipeline: the pipeline that runs the steps.

    Raises:
        ValueError: an unsuitable setting, model, group or mesh.
        PipelineError: another rank could not be constructed.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *more_in_order: Any,
        num_chunks: int = 0,
        enable_profiling: bool = False,
        config: DualPipeConfig | None = None,
        process_group: dist.ProcessGroup | None = None,
        replica_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        **more: Any,
    ) -> None:
        if model is None:
            raise ValueError("DualPipeTrainer needs model=: a model_init would not be cut again")
        _refuse(self, more)
        args = args or TrainingArguments(output_dir="tmp_trainer")
        ranks = TrainerRanks.of(process_group, replica_group, mesh)
        chosen = config or DualPipeConfig()
        if recomputes(args):
            chosen = replace(chosen, memory_optimization="activation_checkpoint")
        if chosen.seed is None:
            chosen = replace(chosen, seed=args.seed)
        if num_chunks:
            chosen = replace(chosen, num_microbatches=num_chunks)
        own_args = accepted(args)
        show_one_process(own_args, ranks.number)
        super().__init__(model, own_args, *more_in_order, **more)
        self._ranks = ranks
        self._profiles = enable_profiling
        self._wants_logits = True
        self._last_update = -1
        self._told_by: Any = None  # the optimizer whose failures the other ranks learn of
        self._num_accumulated = 0
        self._loss = ModelLoss(model)
        self._batches = BatchPipeline(
            model, chosen, ranks, rank_device(own_args.device, ranks.number), self.label_names
        )
        self.pipeline = self._batches.pipeline
        self.pipeline.times_device = enable_profiling
        self._autocast = torch.bfloat16 if own_args.bf16 else None
        self.accelerator.clip_grad_norm_ = self._clip

    # Steps

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Runs one batch forward and backward; returns its loss."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        num_items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        factor = 1.0 if num_items is not None else 1.0 / self.current_gradient_accumulation_steps
        self.pipeline.resume_at(self._number_of_batch())
        self._tell_of_failed_updates()
        loss, _ = self._batches.step(
            inputs,
            self._loss.of(self._labels(inputs), num_items),
            factor=factor,
            autocast=self._autocast,
            sync_gradients=self.accelerator.sync_gradients,
        )
        return torch.tensor(loss, device=self.args.device)

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Creates the optimizer as the trainer does.

        Raises:
            TypeError: the optimizer keeps its state in shards.
        """
        made = super().create_optimizer(*args, **options)
        refuse_shards(made)
        return made

    def _tell_of_failed_updates(self) -> None:
        """Makes all ranks raise if the optimizer raises on any of them."""
        optimizer = self._torch_optimizer()
        if self._told_by is optimizer:
            return
        self._told_by = optimizer
        step = optimizer.step

        @wraps(step)
        def told(_: Any, *args: Any, **options: Any) -> Any:
            own = partial(step, *args, **options)
            return update_together(self.pipeline, self._ranks.replicas, own)

        optimizer.step = MethodType(told, optimizer)  # schedulers that come later bind it again

    def _number_of_batch(self) -> int:
        """Returns the batch's number in the whole training, whatever was resumed or evaluated."""
        if self.state.global_step != self._last_update:
            self._last_update, self._num_accumulated = self.state.global_step, 0
        self._num_accumulated += 1
        before = self._last_update * int(self.args.gradient_accumulation_steps)
        return before + self._num_accumulated - 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the loss of one batch, without gradients; for evaluation."""
        num_items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        of_batch = self._loss.of(self._labels(inputs), num_items)
        with torch.no_grad():
            value, outputs = self._batches.step(inputs, of_batch, autocast=self._autocast)
        loss = torch.tensor(value, device=self.args.device)
        return (loss, self._outputs(outputs, inputs)) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Returns loss, logits and labels of one batch, the same on every rank."""
        self._wants_logits = not prediction_loss_only
        if self.label_names and all(inputs.get(name) is not None for name in self.label_names):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        outputs = self._batches.infer(inputs, autocast=self._autocast)
        return None, self._outputs(outputs, inputs).get("logits"), None

    def _labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        return inputs.get(self.label_names[0]) if self.label_names else None

    def _outputs(self, own: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        if not self._wants_logits:
            return {}
        logits = self._batches.first_output(own, next(iter(inputs.values())).size(0))
        return {"logits": logits.float().to(self.args.device)}

    def _clip(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips by the norm of the whole model's gradient, instead of accelerate."""
        return self.pipeline.clip_grad_norm_(max_norm, norm_type)

    def log(self, logs: dict[str, float], *more: Any, **options: Any) -> None:
        """Logs; with ``enable_profiling``, adds the last step's times to logs of losses."""
        if self._profiles and "loss" in logs:
            found = self.pipeline.stats()
            logs["pipeline_step_seconds"] = found.step_seconds
            logs["pipeline_busy_seconds"] = found.busy_seconds
            logs["pipeline_bubble"] = found.measured_bubble
        super().log(logs, *more, **options)

    # The unsplit model

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any
    ) -> Any:
        """Trains as the trainer does; afterwards :attr:`model` has all values on every rank.

        ``resume_from_checkpoint=True`` resumes from the last complete checkpoint.

        Raises:
            ValueError: there is no complete checkpoint, on the first rank.
            PipelineError: the same, on the others.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        result = super().train(resume_from_checkpoint, *args, **options)
        update_model(self.model, self.pipeline, self._ranks)
        return result

    def _last_checkpoint(self) -> str:
        """Returns the last complete checkpoint that the first rank finds."""
        ranks = Ranks(self.pipeline.group, self.pipeline.config.timeout)
        failure = "found nothing to resume from"
        find = partial(last_complete_checkpoint, str(self.args.output_dir))
        return self._ranks.replicas.from_first(lambda: ranks.from_first(find, failure), failure)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the whole model on the first rank; call it on every rank.

        Raises:
            Exception: what went wrong, on the first rank.
            PipelineError: the same, on the others.
        """
        update_model(self.model, self.pipeline, self._ranks)
        save = partial(super().save_model, output_dir, _internal_call)
        through_together(self._ranks, save, "could not save the model")

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        """Not supported.

        Raises:
            ValueError: always.
        """
        raise ValueError("DualPipeTrainer has one model, which is not cut again for each trial")

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        save = partial(super()._save_checkpoint, *args, **options)
        through_together(self._ranks, save, "could not save the checkpoint")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._ranks.replicas.index:
            return  # the first one has all of it
        with whole_state(self._torch_optimizer(), self.pipeline, self._ranks.host):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with own_state_alone(self._torch_optimizer(), self.pipeline):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:  # the same on every rank
            super()._save_rng_state(output_dir)

    def _torch_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    # What would place or wrap the model

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Does nothing: stages are moved, not the whole model."""

    def _wrap_model(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return self.pipeline


def _refuse(trainer: Trainer, more: Mapping[str, Any]) -> None:
    """Raises if something was passed that would be ignored."""
    for name, why in {
        "model_init": "the model is cut once; pass model=",
        "compute_loss_func": "the loss is the model's own; use dualpipe_ext.TrainingWrapper with a "
        "loss_fn for another one",
    }.items():
        if more.get(name) is not None:
            raise ValueError(f"DualPipeTrainer does not take {name}: {why}")
    if type(trainer).compute_loss is not DualPipeTrainer.compute_loss:
        raise ValueError(
            f"{type(trainer).__name__}.compute_loss would not be called in training: a loss is "
            f"computed of each micro-batch's logits, with the model's own loss_function"
        )
