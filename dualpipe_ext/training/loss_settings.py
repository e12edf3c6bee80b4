"""What a loss function says about its own mean, checked against the options of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["IGNORED", "LossSettings"]

IGNORED = -100  # torch's default for ignore_index
TORCH_LOSSES = (nn.modules.loss._Loss, nn.modules.loss._WeightedLoss)


@dataclass(frozen=True)
class LossSettings:
    """The settings of a loss function that concern its mean; ``None``: not known.

    Attributes:
        function: the function, without arguments bound by ``functools.partial``.
        reduction: its own reduction.
        weight: its weights by class.
        ignore_index: the label that does not count.
        num_trained: the number of its own trainable parameters.
        is_known: whether it is a known loss over classes, of torch or of this package.
    """

    function: Callable[..., Any]
    reduction: str | None
    weight: Tensor | None
    ignore_index: int | None
    num_trained: int
    is_known: bool

    @classmethod
    def of(cls, loss_fn: Callable[..., Any], by_class: Collection[Any]) -> LossSettings:
        """Returns the settings of a function, a module or a partial of one.

        Args:
            loss_fn: returns the loss of some rows.
            by_class: functions besides torch's that leave out labels of ``IGNORED`` by default.
        """
        given: dict[str, Any] = {}
        while isinstance(loss_fn, partial):
            given = {**loss_fn.keywords, **given}
            loss_fn = loss_fn.func
        if isinstance(loss_fn, TORCH_LOSSES):
            given = {**vars(loss_fn), "weight": getattr(loss_fn, "weight", None), **given}
        is_known = loss_fn in (F.cross_entropy, F.nll_loss, *by_class)
        is_known |= type(loss_fn) in (nn.CrossEntropyLoss, nn.NLLLoss)  # subclasses may differ
        if is_known:
            given = {"ignore_index": IGNORED, **given}
        else:
            given["weight"] = None  # weights by element; the mean is still one over rows
        parameters = loss_fn.parameters() if isinstance(loss_fn, nn.Module) else []
        return cls(
            loss_fn,
            given.get("reduction"),
            given.get("weight"),
            given.get("ignore_index"),
            sum(parameter.requires_grad for parameter in parameters),
            is_known,
        )

    def check(self, reduction: str | None, ignore_index: int) -> None:
        """Raises ValueError if these settings contradict the options of the training loop."""
        if self.num_trained:
            raise ValueError(
                f"the loss_fn has {self.num_trained} parameters, and no stage trains them; make them "
                f"part of the model's last layers"
            )
        if self.reduction == "none" or (self.reduction == "mean" and reduction == "sum"):
            raise ValueError(
                f"the loss_fn has reduction={self.reduction!r}, and the loss of a batch was to be "
                f"reduction={reduction!r}; give both 'sum', or the loss_fn 'mean'"
            )
        if self.reduction == "sum" and reduction not in (None, "sum"):
            raise ValueError(
                f"the loss_fn has reduction='sum', and the loss of a batch was to be "
                f"reduction={reduction!r}; give the loss_fn reduction='mean'"
            )
        if self.reduction != "sum" and self.weight is not None:
            raise ValueError(
                "the loss_fn weighs classes, so its mean is one over weights, which no reduction "
                "here is; give it reduction='sum'"
            )
        if self.ignore_index not in (None, ignore_index) and reduction in (None, "token"):
            raise ValueError(
                f"the loss_fn leaves out labels of {self.ignore_index}, and those that count are "
                f"others than {ignore_index}: give both the same ignore_index"
            )
