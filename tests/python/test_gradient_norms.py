"""Norms of gradients that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dualpipe_ext import DualPipe
from dualpipe_ext.testing import run_ranks


def _clip(rank: int, _: int, stage: int, value: float) -> tuple[float, list[float]]:
    """Returns the largest |gradient| and the gradients, with one element of a stage set."""
    model = DualPipe([nn.Linear(2, 2), nn.Linear(2, 2)])
    for own, module in zip(model.stages, model.module, strict=True):
        for name, parameter in module.named_parameters():
            parameter.grad = torch.ones_like(parameter)
            if own == stage and name == "bias":
                parameter.grad[0] = value
    norm = model.clip_grad_norm_(math.inf, math.inf)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return float(norm), [float(x) for grad in grads for x in grad.flatten()]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_largest_gradient_that_is_nan(stage: int) -> None:
    for norm, _ in run_ranks(_clip, 2, args=(stage, math.nan)):
        assert math.isnan(norm)


def test_an_infinite_limit_changes_nothing() -> None:
    for norm, gradients in run_ranks(_clip, 2, args=(1, math.inf)):
        assert norm == math.inf
        assert sorted(gradients) == [1.0] * 11 + [math.inf]
