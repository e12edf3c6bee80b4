"""Steps of a training loop that fail: all ranks are told, and training goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import make_gpt
from outcomes import Outcome, attempt, outcomes
from plain_models import WIDTH
from test_training_mistakes import LABELS, TEXT, make
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

from dualpipe_ext import DualPipeConfig, TrainingWrapper
from dualpipe_ext.testing import run_ranks

pytestmark = pytest.mark.measures  # failures are told within seconds


def test_a_failed_step_ends_its_accumulation() -> None:
    """What was accumulated is gone, on every rank; training goes on as if it had not been."""

    class Failing(nn.Module):
        fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if Failing.fails:
                raise RuntimeError("out of luck")
            return x

    def model() -> nn.Module:
        made = make_gpt()
        made.add_module("norm", nn.Sequential(nn.LayerNorm(WIDTH), Failing()))
        return made

    def train(rank: int, size: int) -> tuple[Outcome, float]:
        wrapper = make(model=model, accumulation_steps=2)
        wrapper.train_step((TEXT, LABELS))
        Failing.fails = True
        failed = attempt(wrapper.train_step, (TEXT, LABELS))
        wrapper.pipeline.group.all_gather("all have failed", 20.0)
        Failing.fails = False
        assert all(p.grad is None for p in wrapper.pipeline.parameters())
        wrapper.train_step((TEXT, LABELS))
        assert wrapper.num_updates == 0
        wrapper.train_step((TEXT, LABELS))
        assert wrapper.num_updates == 1
        return failed, float(wrapper.evaluate((TEXT, LABELS)))

    def train_well(rank: int, size: int) -> float:
        wrapper = make(accumulation_steps=2)
        for _ in range(2):
            wrapper.train_step((TEXT, LABELS))
        return float(wrapper.evaluate((TEXT, LABELS)))

    expected = [outcome.value for outcome in outcomes(train_well, 2)]
    for rank, outcome in enumerate(outcomes(train, 2)):
        failed, loss = outcome.value
        assert failed.is_a("PipelineError") and "out of luck" in failed.text
        assert loss == pytest.approx(expected[rank], rel=1e-6)


class Failing(SGD):
    """Raises in its first step, on the ranks that are told to."""

    def __init__(self, parameters: Any, on: bool) -> None:
        super().__init__(parameters, lr=0.1)
        self.fails = on

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            self.fails = False
            raise RuntimeError("out of luck")
        return super().step(closure)


@pytest.mark.parametrize("culprit", range(4))
def test_an_optimizer_that_raises_is_told_to_all_ranks(culprit: int, tmp_path: Path) -> None:
    """Ranks may have other parameters than their mirrors then: they are loaded before going on."""

    def train(rank: int, size: int) -> Outcome:
        wrapper = make(
            optimizer=partial(Failing, on=rank == culprit),
            config=DualPipeConfig(timeout=20.0),
            max_grad_norm=1.0,
            accumulation_steps=2,
        )
        wrapper.save_checkpoint(tmp_path)
        before = float(wrapper.evaluate((TEXT, LABELS)))
        wrapper.train_step((TEXT, LABELS))
        failed = attempt(wrapper.train_step, (TEXT, LABELS))
        assert all(p.grad is None for p in wrapper.pipeline.parameters())
        for act in (partial(wrapper.train_step, (TEXT, LABELS)), partial(save, wrapper)):
            refused = attempt(act)
            assert refused.is_a("ValueError") and "load_checkpoint() first" in refused.text
        wrapper.load_checkpoint(tmp_path)
        assert float(wrapper.evaluate((TEXT, LABELS))) == before
        for _ in range(2):
            wrapper.train_step((TEXT, LABELS))
        assert float(wrapper.evaluate((TEXT, LABELS))) < before
        return failed

    def save(wrapper: TrainingWrapper) -> object:
        return wrapper.save_checkpoint(tmp_path)

    for rank, failed in enumerate(run_ranks(train, 4)):
        assert failed.error == ("RuntimeError" if rank == culprit else "PipelineError"), failed
        assert "out of luck" in failed.text and failed.seconds < 5.0
        if rank != culprit:
            assert failed.text.startswith(f"rank {culprit} could not update its parameters")


def test_gradients_that_cannot_be_unscaled_are_told_to_all_ranks(tmp_path: Path) -> None:
    def train(rank: int, size: int) -> Outcome:
        wrapper = make(config=DualPipeConfig(timeout=20.0), scaler=GradScaler("cpu"))
        wrapper.save_checkpoint(tmp_path)
        scaler: Any = wrapper._trained_by._scaler
        unscale = scaler.unscale
        if rank == 1:
            scaler.unscale = refuse
        failed = attempt(wrapper.train_step, (TEXT, LABELS))
        scaler.unscale = unscale
        wrapper.load_checkpoint(tmp_path)
        wrapper.train_step((TEXT, LABELS))  # although the others have unscaled what was before
        assert wrapper.num_updates == 1
        return failed

    def refuse(*_: object) -> None:
        raise ValueError("Attempting to unscale FP16 gradients.")

    for rank, failed in enumerate(run_ranks(train, 4)):
        assert failed.error == ("ValueError" if rank == 1 else "PipelineError"), failed
        assert "unscale FP16" in failed.text and failed.seconds < 5.0
