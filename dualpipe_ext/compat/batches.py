"""Runs whole batches over a pipeline, for loops that clip and step the optimizer themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext.compat.ranks import TrainerRanks, both_ends
from dualpipe_ext.config import DualPipeConfig
from dualpipe_ext.training.batches import Batch, BatchReader
from dualpipe_ext.training.building import build_pipeline
from dualpipe_ext.training.cutting import OwnPart
from dualpipe_ext.training.losses import BatchLoss
from dualpipe_ext.training.parts import Part
from dualpipe_ext.training.reports import Report
from dualpipe_ext.training.rows import even_part
from dualpipe_ext.training.setup import input_names
from dualpipe_ext.training.side_by_side import StepsSideBySide
from dualpipe_ext.training.steps import BatchSteps

__all__ = ["BatchPipeline"]


class BatchPipeline:
    """One rank's stages of a model, which take whole batches.

    Every rank of every replica passes the same batch and gets the same loss. Replicas divide its
    rows evenly; if a replica has fewer rows than micro-batches, or none, rows that do not count are
    added. Steps leave the caller's random number generators as they were, so that they stay the
    same on all ranks and can be used to draw data.

    Args:
        model: a whole model with an adapter. This rank's partitions share their parameters with it.
        config: must be the same on every rank.
        ranks: the ranks of this pipeline and of its replicas.
        device: where to move this rank's stages.
        label_names: which entries of a batch by name are labels.
        sample_inputs: as for :class:`dualpipe_ext.TrainingWrapper`.

    Attributes:
        pipeline: the pipeline of this replica, which runs the steps.
        ranks: the ranks that were given.
        local_module: this rank's stages.
        num_labels: how many tensors of the last batch were labels.

    Raises:
        ValueError: a schedule other than DualPipe, or an unsuitable model or groups.
        PipelineError: another rank could not be constructed.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DualPipeConfig,
        ranks: TrainerRanks,
        device: torch.device,
        label_names: Sequence[str] = ("labels",),
        sample_inputs: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.ranks = ranks
        replicas = ranks.replicas
        self.pipeline = build_pipeline(
            model,
            config,
            ranks.group,
            replicas,
            check=lambda: _check_schedule(config),
            adopt=lambda part: self._adopt(part, device, tuple(label_names)),
            sample_inputs=sample_inputs,
        )
        self.local_module = self.pipeline.module
        self.num_labels = 1
        share = replicas.index, replicas.size
        self._steps = BatchSteps(self.pipeline, self.rows, 0, config.timeout, share)
        self._side_by_side = StepsSideBySide(self.pipeline, replicas)
        self._has_drifted = False  # whether buffers may differ since they were last averaged

    def _adopt(
        self, part: OwnPart, device: torch.device, label_names: tuple[str, ...]
    ) -> tuple[list[nn.Module], dict[str, Any]]:
        """Takes this rank's stages and rows; if one rank cannot, the others raise as well."""
        self.rows = part.rows
        stages = [stage.to(device) for stage in part.stages]
        self._reader = BatchReader(input_names(stages), label_names)
        return stages, {"stages": {}}

    def step(
        self,
        given: Any,
        loss: BatchLoss,
        *,
        factor: float = 1.0,
        autocast: torch.dtype | None = None,
        sync_gradients: bool = False,
    ) -> tuple[float, Any]:
        """Runs a batch forward and backward; under ``torch.no_grad()``, only forward, with outputs.

        Args:
            given: the batch, the same on every rank of every replica.
            loss: the loss of its micro-batches.
            factor: multiplies the loss and its gradients.
            autocast: the dtype of autocast around forwards and losses; by default the caller's.
            sync_gradients: sum gradients over all copies of each stage.

        Returns:
            The loss of the whole batch times ``factor``, the same on every rank, and the outputs of
            the rows that leave here, including rows that were added.

        Raises:
            ValueError, TypeError: a batch that does not fit the model, or ranks or replicas with
                different batches.
            PipelineError: a stage raised, or another rank failed.
        """
        trains = torch.is_grad_enabled()
        self._before(trains)
        part, total = self._side_by_side.ready(
            lambda: self._steps.of_whole(lambda: self._read(given), loss, fill=True),
            lambda part, total: self._check(part, total, loss),
        )
        own, outputs = self._side_by_side.run(
            lambda sums: self._steps.run(
                part,
                loss,
                total,
                factor=factor,
                autocast=autocast,
                sync_gradients=sums,
                return_outputs=not trains,
            ),
            sync_gradients,
        )
        whole = self._side_by_side.summarize(Report(own, part.fingerprint)).loss
        if trains:
            self._steps.tell_of_imbalance()
        return whole, outputs

    def infer(self, given: Any, *, autocast: torch.dtype | None = None) -> Any:
        """Returns the outputs of the rows that leave here; labels are ignored.

        Raises as :meth:`step` does.
        """
        self._before(trains=False)
        part, _ = self._side_by_side.ready(
            lambda: self._steps.of_inputs(lambda: self._reader.read_inputs(given)),
            self._check,
        )
        outputs = self.ranks.replicas.together(lambda: self._steps.infer(part, autocast))
        self._side_by_side.settle()
        self._side_by_side.summarize(Report(0.0, part.fingerprint))
        return outputs

    def first_output(self, outputs: Any, rows: int) -> Tensor:
        """Returns the first output of all rows of a batch, on every rank and in host memory.

        Args:
            outputs: what :meth:`step` or :meth:`infer` returned here.
            rows: the number of rows of the whole batch, over all replicas.

        Returns:
            A tensor of shape ``[rows, ...]``.
        """
        replicas = self.ranks.replicas
        own = len(even_part(rows, replicas.index, replicas.size))
        found = replicas.together(lambda: both_ends(outputs, self.pipeline, self.ranks.host)[:own])
        return torch.cat(replicas.gather_objects(found))

    def sync_gradients(self) -> None:
        """Sums gradients over all copies of each stage, after an accumulation; all ranks call it."""
        self._side_by_side.sync_gradients()

    def _before(self, trains: bool) -> None:
        if self._has_drifted and not trains:
            self.ranks.replicas.average_buffers(self.pipeline)
        self._has_drifted = trains

    def _check(self, part: Part, total: int, loss: BatchLoss | None = None) -> None:
        """Raises if replicas were given different batches, or if no label counts."""
        found = self.ranks.replicas.gather(part.fingerprint)
        for replica, other in enumerate(found):
            if other != found[0]:
                raise ValueError(
                    f"replica {replica} was given another batch than replica 0; every rank of every "
                    f"replica reads the same batches, and takes its own rows: leave out samplers "
                    f"that divide the data among ranks, and seed all ranks alike"
                )
        if loss is not None:
            loss.check(total)

    def _read(self, given: Any) -> Batch:
        batch = self._reader.read(given)
        if not batch.labels:
            raise ValueError(
                f"the batch has no labels to compute a loss with: none of "
                f"{', '.join(self._reader.labels)}"
            )
        self.num_labels = len(batch.labels)
        return batch


def _check_schedule(config: DualPipeConfig) -> None:
    if config.schedule != "dualpipe":
        raise ValueError(
            f"schedule={config.schedule!r}: trainers of other libraries run 'dualpipe'; others are "
            f"run by dualpipe_ext.TrainingWrapper"
        )
