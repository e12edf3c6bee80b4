"""Steps of a pipeline over batches as loops have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dualpipe_ext.pipeline import Pipeline
from dualpipe_ext.training.batches import Batch, fingerprint
from dualpipe_ext.training.imbalance import ImbalanceWatch
from dualpipe_ext.training.losses import BatchLoss
from dualpipe_ext.training.modes import autocasting
from dualpipe_ext.training.parts import Cutter, Part
from dualpipe_ext.training.rows import RowPlan

__all__ = ["BatchSteps"]

BY_ROWS = BatchLoss(torch.sum, "mean")


class BatchSteps:
    """Takes this rank's part out of batches, and runs the steps on them.

    Args:
        pipeline: that runs them.
        rows: where its micro-batches' rows enter and leave.
        dim: the dimension of the rows.
        timeout: seconds to wait for other ranks.
        share: which part of the rows of a whole batch is this pipeline's, and of how many.

    Attributes:
        device: of this rank's stages.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        rows: RowPlan,
        dim: int,
        timeout: float,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.device = next((each.device for each in pipeline.parameters()), torch.device("cpu"))
        self._pipeline = pipeline
        self._watch = ImbalanceWatch(pipeline)
        self._rows = rows
        self._cutter = Cutter(rows, pipeline.group, BY_ROWS, self.device, dim, timeout, share)

    def of_whole(self, read: Callable[[], Batch], loss: BatchLoss, fill: bool = False) -> Part:
        """This rank's part of a batch that all ranks read.

        Args:
            read: gets the batch.
            loss: what its rows weigh.
            fill: as for :meth:`Cutter.of_whole`.

        Raises:
            Exception: what ``read`` raised, or the batch cannot be cut; the other ranks' step ends.
        """
        try:
            batch = read()
            part = replace(self._cutter, loss=loss).of_whole(batch, fill)
            return replace(part, fingerprint=fingerprint(batch))
        except BaseException as error:
            self._pipeline.abandon_step(error)
            raise

    def of_inputs(self, read: Callable[[], Batch]) -> Part:
        """The same without labels; its total is the number of rows before any were added."""
        return self.of_whole(lambda: Batch(read().inputs, ()), BY_ROWS, fill=True)

    def of_halves(self, read: Callable[[], Batch], loss: BatchLoss) -> Part:
        """This rank's part, which is all that it reads; raises as :meth:`Cutter.of_halves`."""
        return replace(self._cutter, loss=loss).of_halves(read)

    def run(
        self,
        part: Part,
        loss: BatchLoss,
        total: int,
        *,
        factor: float = 1.0,
        autocast: torch.dtype | None = None,
        sync_gradients: bool = False,
        return_outputs: bool = False,
    ) -> tuple[float, Any]:
        """Forward and backward; under ``torch.no_grad()`` the forward.

        Args:
            part: of the batch.
            loss: of its micro-batches.
            total: how many units have weight 1 together.
            factor: of the loss and its gradients.
            autocast: the type of autocast around forwards and losses; left out, the caller's.
            sync_gradients: as for :meth:`dualpipe_ext.Pipeline.step`.
            return_outputs: likewise.

        Returns:
            This rank's part of the loss, and its outputs.
        """
        weights = [factor * loss.weight(units, total) for units in part.units]
        with autocasting(self.device, autocast):
            losses, outputs = self._pipeline.step(
                *part.inputs,
                num_chunks=self._rows.num_microbatches,
                criterion=loss.criterion(weights),
                labels=part.labels,
                return_outputs=return_outputs,
                sync_gradients=sync_gradients,
            )
        return 0.0 if losses is None else float(losses.double().sum()), outputs

    def tell_of_imbalance(self) -> None:
        """After a training step that all ranks came through; warns on the first one."""
        self._watch.after_step()

    def infer(self, part: Part, autocast: torch.dtype | None = None) -> Any:
        """The outputs of the rows that leave here, those that were added among them."""
        with torch.no_grad(), autocasting(self.device, autocast):
            _, outputs = self._pipeline.step(
                *part.inputs, num_chunks=self._rows.num_microbatches, return_outputs=True
            )
        return outputs
