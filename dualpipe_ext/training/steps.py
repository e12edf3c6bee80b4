"""Runs steps of a pipeline over batches as training loops provide them."""

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
    """Takes this rank's part out of batches, and runs steps on it.

    Args:
        pipeline: the pipeline that runs the steps.
        rows: where the rows of its micro-batches enter and leave.
        dim: the dimension of the rows.
        timeout: seconds to wait for other ranks.
        share: as for :class:`Cutter`.

    Attributes:
        device: the device of this rank's stages.
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
        """Returns this rank's part of a batch that all ranks read.

        Args:
            read: returns the batch.
            loss: gives the weights of its rows.
            fill: as for :meth:`Cutter.of_whole`.

        Raises:
            Exception: what ``read`` raised, or the batch cannot be split; the step of the other
                ranks then fails, too.
        """
        try:
            batch = read()
            part = replace(self._cutter, loss=loss).of_whole(batch, fill)
            return replace(part, fingerprint=fingerprint(batch))
        except BaseException as error:
            self._pipeline.abandon_step(error)
            raise

    def of_inputs(self, read: Callable[[], Batch]) -> Part:
        """Does the same without labels; the total is the number of rows before any were added."""
        return self.of_whole(lambda: Batch(read().inputs, ()), BY_ROWS, fill=True)

    def of_halves(self, read: Callable[[], Batch], loss: BatchLoss) -> Part:
        """Returns this rank's part if it reads nothing else; raises as :meth:`Cutter.of_halves`."""
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
        """Runs forward and backward; under ``torch.no_grad()``, only the forward.

        Args:
            part: this rank's part of the batch.
            loss: the loss of its micro-batches.
            total: how many units together have a weight of 1.
            factor: multiplies the loss and its gradients.
            autocast: the dtype of autocast around forwards and losses; by default the caller's.
            sync_gradients: as for :meth:`dualpipe_ext.Pipeline.step`.
            return_outputs: likewise.

        Returns:
            This rank's share of the loss, and its outputs.
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
        """Warns of uneven stages on the first rank; all call it after a training step succeeded."""
        self._watch.after_step()

    def infer(self, part: Part, autocast: torch.dtype | None = None) -> Any:
        """Returns the outputs of the rows that leave here, including rows that were added."""
        with torch.no_grad(), autocasting(self.device, autocast):
            _, outputs = self._pipeline.step(
                *part.inputs, num_chunks=self._rows.num_microbatches, return_outputs=True
            )
        return outputs
