"""Whole batches over a pipeline, for loops that clip and step the optimizer themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext._handshake import agree
from dualpipe_ext.adapters import Cost
from dualpipe_ext.config import DualPipeConfig
from dualpipe_ext.groups import PipelineGroup
from dualpipe_ext.pipeline import Pipeline
from dualpipe_ext.training.batches import Batch, BatchReader
from dualpipe_ext.training.cutting import measured_costs, own_part
from dualpipe_ext.training.losses import BatchLoss
from dualpipe_ext.training.reports import Report, summarize
from dualpipe_ext.training.setup import input_names, warn_of_other_models, weights_digest
from dualpipe_ext.training.steps import BatchSteps

__all__ = ["BatchPipeline"]


class BatchPipeline:
    """A model in stages, one rank's of them, which takes whole batches.

    Every rank gives the same batch and gets the same loss. Rows are added that do not count where a
    batch has fewer of them than micro-batches. Random numbers of the caller are as they were
    afterwards, so that they stay the same on all ranks: what draws data may use them.

    Args:
        model: a whole model with an adapter. This rank's partitions share their parameters with it.
        config: the same on every rank.
        group: the ranks.
        device: where this rank's stages go.
        label_names: which entries of a batch by name are labels.
        sample_inputs: as for :class:`dualpipe_ext.TrainingWrapper`.

    Attributes:
        pipeline: what runs the steps.
        local_module: this rank's stages.
        num_labels: how many tensors of the last batch were labels.

    Raises:
        ValueError: a schedule other than DualPipe, or a model or group that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DualPipeConfig,
        group: PipelineGroup,
        device: torch.device,
        label_names: Sequence[str] = ("labels",),
        sample_inputs: Sequence[Tensor | None] | None = None,
    ) -> None:
        if config.schedule != "dualpipe":
            raise ValueError(
                f"schedule={config.schedule!r}: trainers of other libraries run 'dualpipe'; others "
                f"are run by dualpipe_ext.TrainingWrapper"
            )
        weights = weights_digest(model)  # before both copies of a stage are made equal
        costs = measured_costs(model, config, sample_inputs, group)
        agree(group, config.timeout, lambda: self._adopt(model, config, costs, group, device))
        warn_of_other_models(weights, group, config.timeout)
        stages = self._stages
        self.pipeline = Pipeline(stages, config.schedule, 0, group, config=config)
        self.local_module = self.pipeline.module
        self.num_labels = 1
        self._reader = BatchReader(input_names(stages), tuple(label_names))
        self._steps = BatchSteps(self.pipeline, self.rows, 0, config.timeout)

    def _adopt(
        self,
        model: nn.Module,
        config: DualPipeConfig,
        costs: list[Cost] | None,
        group: PipelineGroup,
        device: torch.device,
    ) -> dict[str, Any]:
        """Cuts the model; a rank that cannot is told to the others."""
        part = own_part(model, config, costs, group)
        self.rows = part.rows
        self._stages = [stage.to(device) for stage in part.stages]
        return {"stages": {}}

    def step(
        self,
        given: Any,
        loss: BatchLoss,
        *,
        factor: float = 1.0,
        autocast: torch.dtype | None = None,
        sync_gradients: bool = False,
    ) -> tuple[float, Any]:
        """Forward and backward of a batch; under ``torch.no_grad()`` the forward, with outputs.

        Args:
            given: the batch, the same on every rank.
            loss: of its micro-batches.
            factor: of the loss and its gradients.
            autocast: the type of autocast around forwards and losses; left out, the caller's.
            sync_gradients: as for :meth:`dualpipe_ext.Pipeline.step`.

        Returns:
            The loss times ``factor``, the same on every rank, and the outputs of the rows that
            leave here, rows that were added among them.

        Raises:
            ValueError, TypeError: a batch that does not fit the model, or ranks with different ones.
            PipelineError: a stage raised, or another rank failed.
        """
        part = self._steps.of_whole(lambda: self._read(given), loss, fill=True)
        own, outputs = self._steps.run(
            part,
            loss,
            part.total,
            factor=factor,
            autocast=autocast,
            sync_gradients=sync_gradients,
            return_outputs=not torch.is_grad_enabled(),
        )
        whole = summarize(self.pipeline.group, Report(own, part.fingerprint)).loss
        if torch.is_grad_enabled():
            self._steps.tell_of_imbalance()
        return whole, outputs

    def infer(self, given: Any, *, autocast: torch.dtype | None = None) -> Any:
        """The outputs of the rows that leave here; labels are not looked at."""
        return self._steps.infer(self._steps.of_inputs(lambda: self._reader.read(given)), autocast)

    def _read(self, given: Any) -> Batch:
        batch = self._reader.read(given)
        if not batch.labels:
            raise ValueError(
                f"the batch has no labels to compute a loss with: none of "
                f"{', '.join(self._reader.labels)}"
            )
        self.num_labels = len(batch.labels)
        return batch
