"""The losses that transformers models compute from their logits, for micro-batches."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor

from dualpipe_ext.training.losses import IGNORED, BatchLoss

__all__ = ["ModelLoss"]

_LOSSES = (
    "ForCausalLM",
    "ForMaskedLM",
    "ForTokenClassification",
    "ForSequenceClassification",
    "ForImageClassification",
)
_BY_PROBLEM = ("ForSequenceClassification", "ForImageClassification")  # one function for both


class ModelLoss:
    """A model's own ``loss_function``.

    Args:
        model: a transformers model with a head.

    Raises:
        ValueError: the model's loss is not a known one, or it has none.
    """

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        kind = getattr(model, "loss_type", None)
        if kind is None and name.endswith("LMHeadModel"):
            kind = "ForCausalLM"  # as transformers itself assumes
        if kind not in _LOSSES:
            raise ValueError(
                f"{name} has no loss that can be computed micro-batch by micro-batch: its loss is "
                f"{kind}, known ones are {', '.join(_LOSSES)}; use a model with such a head, or "
                f"dualpipe_ext.TrainingWrapper with a loss_fn"
            )
        self._function = model.loss_function
        self._config = model.config
        self._is_by_problem = kind in _BY_PROBLEM
        self._is_shifted = kind == "ForCausalLM"
        self._hands_on_num_items = _hands_on_keywords(type(model))

    def of(self, labels: Tensor | None, num_items: Tensor | int | None) -> BatchLoss:
        """Returns the loss of one batch.

        Args:
            labels: the labels of the batch.
            num_items: what a cross-entropy is divided by. If it is ``None``, or the model's forward
                does not pass it on, the mean over the labels of the batch is taken.
        """
        if labels is None or not self._is_cross_entropy(labels):
            return BatchLoss(self._call(None), "mean")
        if num_items is None or not self._hands_on_num_items:
            counted = labels[..., 1:] if self._is_shifted else labels
            num_items = (counted != IGNORED).sum()
        return BatchLoss(self._call(int(num_items)), "sum")

    def _is_cross_entropy(self, labels: Tensor) -> bool:
        """Whether it may be a sum divided by a number of items; other losses average over rows."""
        if labels.is_floating_point():
            return False
        if not self._is_by_problem:
            return True
        if self._config.problem_type is not None:
            return bool(self._config.problem_type == "single_label_classification")
        return self._config.num_labels > 1 and labels.dtype in (torch.int64, torch.int32)

    def _call(self, num_items: int | None) -> Any:
        def loss(*outputs_and_labels: Tensor) -> Tensor:
            logits, labels = outputs_and_labels[0], outputs_and_labels[-1]
            # Loss functions take logits by one of two names, and ignore what they do not know.
            value = self._function(
                logits=logits,
                pooled_logits=logits,
                labels=labels,
                config=self._config,
                vocab_size=getattr(self._config, "vocab_size", None),
                num_items_in_batch=None if num_items is None else torch.tensor(num_items),
            )
            assert isinstance(value, Tensor)
            return value

        return loss


def _hands_on_keywords(model: Any) -> bool:
    """Whether a forward passes its caller's further arguments on to its loss function.

    Some heads compute a loss of their own, a mean over the batch, whatever they are passed.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(model.forward)))
    except (OSError, TypeError):
        return True
    return any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "loss_function"
        and any(keyword.arg in (None, "num_items_in_batch") for keyword in call.keywords)
        for call in ast.walk(ast.parse(source))
    )
