"""Losses of micro-batches that add up to the loss of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dualpipe_ext.training.loss_settings import IGNORED, LossSettings

__all__ = ["IGNORED", "BatchLoss", "Reduction", "choose_loss", "cross_entropy", "next_token_loss"]

Reduction = Literal["mean", "sum", "token"]
LossFunction = Callable[..., Tensor]


def cross_entropy(*outputs_and_labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Returns the mean cross-entropy, in nats, of the first output for the labels.

    Args:
        outputs_and_labels: logits ``[..., classes]``, any further outputs, and finally the labels
            ``[...]``, which are integers.
        ignore_index: the label that does not count.

    Raises:
        ValueError: labels that are not class indices, or do not match the logits in shape.
    """
    logits, labels = outputs_and_labels[0], outputs_and_labels[-1]
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"there is no loss_fn, and cross-entropy cannot be had of outputs of shape "
            f"{tuple(logits.shape)} and labels of shape {tuple(labels.shape)}, {labels.dtype}: it "
            f"takes [..., classes] and whole numbers [...]; give TrainingWrapper a loss_fn"
        )
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index)


def next_token_loss(*outputs_and_labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Returns the mean cross-entropy of each position's logits for the label of the next one.

    Hugging Face's causal language models compute it from labels that are the input's own tokens.

    Args:
        outputs_and_labels: as for :func:`cross_entropy`, with time as the second dimension.
        ignore_index: the label that does not count.
    """
    logits, labels = outputs_and_labels[0], outputs_and_labels[-1]
    return cross_entropy(logits[:, :-1], labels[:, 1:], ignore_index=ignore_index)


@dataclass(frozen=True)
class BatchLoss:
    """How the losses of micro-batches make up the loss of a batch.

    Attributes:
        function: ``function(*outputs, *labels)`` is the loss of some rows: their sum for ``"sum"``,
            otherwise the mean over their rows (``"mean"``) or tokens (``"token"``).
        reduction: the weight of a micro-batch: its number of rows or of tokens, or 1.
        ignore_index: the label of what is not a token.
        is_shifted: whether the first label in time counts for no position; ``None``: unknown.
        refuses_padding: whether to refuse labels of ``ignore_index``, which the function may leave
            out of its mean while weights count rows: because nobody chose the reduction, or because
            ``function`` is known to take its mean over labels.
    """

    function: LossFunction
    reduction: Reduction
    ignore_index: int = IGNORED
    is_shifted: bool | None = False
    refuses_padding: bool = False

    def units(self, labels: Sequence[Tensor | None], rows: int) -> int:
        """Returns the weight of a micro-batch, before it is divided by the units of the batch."""
        tokens = labels[0] if labels else None
        if self.reduction == "token":
            return self._num_tokens(tokens)
        if self.refuses_padding and tokens is not None and not tokens.is_floating_point():
            self._refuse_padding(tokens)
        return rows

    def _num_tokens(self, labels: Tensor | None) -> int:
        if labels is None:
            raise ValueError(
                "reduction='token' counts labels, and the batch has none; use 'mean' or 'sum'"
            )
        if self.is_shifted is None and labels.dim() > 1:
            raise ValueError(
                "reduction='token' counts the labels that the loss_fn counts, and one for the next "
                "token may leave out the first label of each row: give shifts_labels=True if it "
                "shifts labels itself, False if each label is for the output in its place; or use "
                "dualpipe_ext.training.next_token_loss or cross_entropy"
            )
        return int(((labels[:, 1:] if self.is_shifted else labels) != self.ignore_index).sum())

    def _refuse_padding(self, labels: Tensor) -> None:
        if bool((labels == self.ignore_index).any()):
            raise ValueError(
                f"labels have the value {self.ignore_index}, which the loss leaves out, or may leave "
                f"out, so that its mean is not one over rows; choose reduction='token' for a mean over the "
                f"other labels; reduction='mean' is for a loss_fn that counts them all"
            )

    def check(self, total: int) -> None:
        """Raises ValueError for a batch of 0 units."""
        if total == 0:
            raise ValueError(
                f"no label of the batch counts: all are {self.ignore_index}, so its mean loss is no "
                f"number; leave the batch out"
            )

    def weight(self, units: int, total: int) -> float:
        """Returns the factor of a micro-batch's loss in the loss of a batch of ``total`` units."""
        return 1.0 if self.reduction == "sum" and units else units / total

    def share(self, units: int) -> float:
        """Returns the factor by which the losses of batches can be added up."""
        return 1.0 if self.reduction == "sum" else float(units)

    def criterion(self, weights: Sequence[float]) -> LossFunction:
        """Returns the weighted loss of a micro-batch; its last label is its number, in each row."""

        def weighted(*outputs_and_labels: Tensor) -> Tensor:
            *values, numbers = outputs_and_labels
            weight = weights[int(numbers.flatten()[0])]
            if weight == 0.0:  # if nothing counts, a mean is not a number
                return _zero(values)
            try:
                return self.function(*values) * weight
            except Exception as error:
                _check_rows(values[0], numbers, error)
                raise

        return weighted


def choose_loss(
    is_causal: bool,
    loss_fn: LossFunction | None,
    reduction: Reduction | None,
    ignore_index: int,
    shifts_labels: bool | None = None,
) -> BatchLoss:
    """Returns the requested loss; by default, the cross-entropy over tokens.

    Args:
        is_causal: labels are the model's own tokens, each for the position before it, unless
            ``shifts_labels`` says otherwise.
        loss_fn: as for :class:`dualpipe_ext.TrainingWrapper`.
        reduction: likewise.
        ignore_index: likewise.
        shifts_labels: likewise.

    Raises:
        ValueError: an unknown reduction, or a ``loss_fn`` that has parameters or settings that
            contradict the other arguments.
        TypeError: ``loss_fn`` is not callable.
    """
    if reduction is not None and reduction not in get_args(Reduction):
        raise ValueError(f"reduction={reduction!r}: choose 'mean', 'sum' or 'token'")
    if loss_fn is not None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function; found {type(loss_fn).__name__}")
        given = LossSettings.of(loss_fn, (cross_entropy, next_token_loss))
        given.check(reduction, ignore_index)
        if reduction is None and given.reduction == "sum":
            reduction = "sum"
        chosen: Reduction = reduction or "mean"
        is_shifted = _is_shifted(given, shifts_labels)
        if chosen == "mean" and given.ignore_index is not None:  # a mean over labels, not over rows
            return BatchLoss(loss_fn, chosen, given.ignore_index, refuses_padding=True)
        return BatchLoss(loss_fn, chosen, ignore_index, is_shifted, reduction is None)
    if reduction not in (None, "token"):
        raise ValueError(
            f"reduction={reduction!r} is for a loss_fn of your own; without one the loss is the "
            f"cross-entropy over tokens"
        )
    shifts = is_causal if shifts_labels is None else shifts_labels
    function = next_token_loss if shifts else cross_entropy
    return BatchLoss(partial(function, ignore_index=ignore_index), "token", ignore_index, shifts)


def _is_shifted(loss: LossSettings, told: bool | None) -> bool | None:
    """Whether a loss leaves out the first label of each row; ``None``: unknown."""
    if not loss.is_known:
        return told
    known = loss.function is next_token_loss
    if told is not None and known != told:
        raise ValueError(
            f"shifts_labels={told}, but this loss_fn {'leaves out' if known else 'counts'} the first "
            f"label of each row; leave shifts_labels out"
        )
    return known


def _check_rows(output: Tensor, numbers: Tensor, error: Exception) -> None:
    """Raises a clearer error if a loss failed because the ends were given different batches."""
    dim, rows = numbers.dim() - 1, numbers.numel()
    if output.dim() > dim and output.shape[dim] != rows:
        raise ValueError(
            f"micro-batch {int(numbers.flatten()[0])} leaves the model with {output.shape[dim]} rows, "
            f"and has labels of {rows}; give every rank the same batch, of as many labels as inputs"
        ) from error


def _zero(outputs: Sequence[Tensor | None]) -> Tensor:
    """Returns a loss of 0 that gives every output a gradient of 0, whatever its values."""
    learning = [x for x in outputs if x is not None and x.is_floating_point()]
    return torch.stack([x.flatten()[:0].sum().float() for x in learning]).sum()
