"""A Lightning module whose steps run over a pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from dualpipe_ext.adapters.base import is_causal_model
from dualpipe_ext.compat.batches import BatchPipeline
from dualpipe_ext.compat.ranks import check_others_update
from dualpipe_ext.config import DualPipeConfig
from dualpipe_ext.training.losses import IGNORED, Reduction, choose_loss

__all__ = ["DualPipeLightningModule"]


class DualPipeLightningModule(LightningModule):  # type: ignore[misc]  # it may not be there to check
    """A module to subclass, defining ``configure_optimizers`` and ``criterion``.

    Train it with ``Trainer(strategy=DualPipeStrategy(), devices=P)``. A batch is a pair of inputs
    and targets, each of one or several tensors, or a mapping by the names of the model's inputs and
    ``labels``; it is the same on every rank of every replica. Replicas, if there are any, divide
    its rows among themselves, and each splits its own into micro-batches. ``train_loss``,
    ``val_loss`` and ``test_loss`` are logged. Steps that you override must call those defined here.

    All of the model's parameters are in ``state_dict()``, under ``model.``. During training, a rank
    has current values of only its own stages; checkpoints and the end of ``fit`` give it all of
    them. Gradients of an earlier batch are set to ``None`` when ``training_step`` begins, unless
    they accumulate. Random numbers of dropout depend on the number of the batch and on
    ``config.seed``, or else on the state that ``seed_everything`` has left: a run resumed with the
    same seed draws the same as an uninterrupted one.

    Args:
        model: a whole model with an adapter, the same on every rank.
        num_chunks: the number of micro-batches of each pipeline; even, and at least twice the
            number of its ranks.
        reduction: what ``criterion`` returns for some rows: their ``"mean"`` or ``"sum"``, or with
            ``"token"`` the mean over targets other than -100. By default it is taken to be the mean
            over rows, and integer targets that contain -100 are refused.
        shifts_labels: as for :class:`dualpipe_ext.TrainingWrapper`.
        config: all other settings of the pipeline.
        sample_inputs: as for :class:`dualpipe_ext.TrainingWrapper`.

    Attributes:
        model: the model that was given.

    Raises:
        ValueError: an unknown reduction.
    """

    def __init__(
        self,
        model: nn.Module,
        num_chunks: int = 0,
        *,
        reduction: Reduction | None = None,
        shifts_labels: bool | None = None,
        config: DualPipeConfig | None = None,
        sample_inputs: Sequence[Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        chosen = config or DualPipeConfig()
        self._config = replace(chosen, num_microbatches=num_chunks) if num_chunks else chosen
        self._loss = choose_loss(
            is_causal_model(model), self._criterion, reduction, IGNORED, shifts_labels
        )
        self._sample_inputs = sample_inputs
        self._built: BatchPipeline | None = None
        self._stepped: float | None = None  # the loss of a training step, until its backward

    @property
    def dualpipe_wrapper(self) -> BatchPipeline:
        """This rank's stages (``local_module``) and what runs them (``pipeline``).

        Raises:
            ValueError: the trainer has not started its ranks yet.
        """
        if self._built is None:
            raise ValueError(
                "there is no pipeline before the trainer has started its ranks; use "
                "dualpipe_wrapper in configure_optimizers and in steps"
            )
        return self._built

    def criterion(self, outputs: Any, targets: Any) -> Tensor:
        """Returns the loss of some rows, given the model's outputs and targets; override it."""
        raise NotImplementedError(f"{type(self).__name__} needs criterion(outputs, targets)")

    def configure_model(self) -> None:
        """Cuts the model; called by the trainer on every rank, and when a checkpoint is read.

        Raises:
            TypeError: the trainer has another strategy.
            ValueError: an unsuitable model, number of ranks or configuration, or trainable
                parameters outside ``model``.
        """
        if self._built is not None or self._trainer is None:
            return
        strategy = self.trainer.strategy
        if not getattr(strategy, "runs_pipelines", False):
            raise TypeError(
                f"a DualPipeLightningModule is trained over a pipeline, which "
                f"{type(strategy).__name__} does not have: use Trainer(strategy="
                f"DualPipeStrategy(), devices=P) with P ranks"
            )
        self._refuse_other_parameters()
        self._built = BatchPipeline(
            self.model,
            self._seeded_config(),
            strategy.make_ranks(),
            strategy.root_device,
            sample_inputs=self._sample_inputs,
        )

    def _refuse_other_parameters(self) -> None:
        """Raises if other parameters, such as a criterion's, would be trained on half a batch."""
        known = {id(parameter) for parameter in self.model.parameters()}
        others = [n for n, p in self.named_parameters() if p.requires_grad and id(p) not in known]
        if others:
            raise ValueError(
                f"{type(self).__name__} has parameters outside of its model: {', '.join(others)}; "
                f"no stage would train them: move them into the model, or freeze them"
            )

    def _seeded_config(self) -> DualPipeConfig:
        """Adds a seed: steps restore the generator, so without one they would all draw the same."""
        if self._config.seed is not None:
            return self._config
        with torch.random.fork_rng([]):  # all ranks have the first one's state
            return replace(self._config, seed=int(torch.randint(2**31, ())))

    # Steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Runs one batch forward and backward; returns its loss."""
        parts = self.trainer.accumulate_grad_batches
        if batch_idx % parts == 0:  # Lightning's own rule, but Lightning would do so after the step
            self.dualpipe_wrapper.pipeline.zero_grad()
        self.dualpipe_wrapper.pipeline.resume_at(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        loss, _ = self._step(batch, factor=1.0 / parts, sync_gradients=parts == 1)
        self._stepped = loss
        return self._logged("train_loss", loss * parts, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of one batch."""
        return self._logged("val_loss", self._step(batch)[0], batch)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of one batch."""
        return self._logged("test_loss", self._step(batch)[0], batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the model's first output for one batch, on every rank and in host memory."""
        built = self.dualpipe_wrapper
        built.pipeline.train(self.training)
        return built.first_output(built.infer(batch), _rows(batch))

    def forward(self, *inputs: Any, **more: Any) -> Any:
        """Runs the unsplit model; only valid when it is not being trained."""
        return self.model(*inputs, **more)

    def optimizer_zero_grad(self, *_: Any, **__: Any) -> None:
        """Does nothing: gradients were zeroed before the step, which has computed new ones."""

    def backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        """Does nothing: the step has already run the backward pass.

        Raises:
            TypeError: an overriding ``training_step`` returned another loss than the step's.
        """
        trained, self._stepped = self._stepped, None
        if trained is None or not _is_close(float(loss), trained):
            raise TypeError(
                f"{type(self).__name__}.training_step returned a loss that was not computed over "
                f"the pipeline, so that it would not be trained; return what "
                f"super().training_step(batch, batch_idx) returns, and put all of the loss into "
                f"criterion"
            )

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm of the whole model's gradient, or by value."""
        if gradient_clip_val is None or gradient_clip_val <= 0:
            return
        pipeline = self.dualpipe_wrapper.pipeline
        if str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)) == "value":
            nn.utils.clip_grad_value_(pipeline.parameters(), gradient_clip_val)
        else:
            check_others_update(pipeline)
            pipeline.clip_grad_norm_(gradient_clip_val)

    def _step(self, batch: Any, **options: Any) -> tuple[float, Any]:
        built = self.dualpipe_wrapper
        built.pipeline.train(self.training)
        return built.step(batch, self._loss, **options)

    def _criterion(self, *outputs_and_labels: Tensor) -> Tensor:
        count = self.dualpipe_wrapper.num_labels
        outputs, labels = outputs_and_labels[:-count], outputs_and_labels[-count:]
        return self.criterion(_one(outputs), _one(labels))

    def _logged(self, name: str, value: float, batch: Any) -> Tensor:
        loss = torch.tensor(value, device=self.device)
        of_epoch = name != "train_loss"
        self.log(name, loss, prog_bar=True, batch_size=_rows(batch), sync_dist=of_epoch)
        return loss


def _one(tensors: tuple[Tensor, ...]) -> Any:
    return tensors[0] if len(tensors) == 1 else tensors


def _is_close(one: float, other: float) -> bool:
    """Whether two losses are equal up to rounding to their dtype."""
    both_nan = math.isnan(one) and math.isnan(other)
    return both_nan or math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-30)


def _rows(batch: Any) -> int:
    """Returns the number of rows of the first tensor in a batch."""
    if isinstance(batch, Tensor):
        return len(batch)
    return _rows(next(iter(batch.values() if hasattr(batch, "values") else batch)))
