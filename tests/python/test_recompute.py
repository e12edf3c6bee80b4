"""Activation checkpointing changes no number: buffers, too, are changed once a micro-batch."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualpipe_ext import DualPipe, DualPipeConfig, PipelineError, TrainingWrapper
from dualpipe_ext.testing import run_ranks

Memory = Literal["none", "activation_checkpoint"]
WIDTH = 4


class Counting(nn.Module):
    """Changes its buffers in every way that there is."""

    calls: Tensor
    last: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.calls += 1
        self.last = hidden.detach().sum() + self.calls
        self.total = self.total + 1
        self.total = self.total + 1  # may be where the one before was
        y: Tensor = self.second(hidden)  # behind them, for a recomputation ends where it may
        return y


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x))
        return y


class Centered(nn.Module):
    """Reads a moving average before it changes it; two modules have it."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.other = nn.Module()
        self.other.register_buffer("mean", self.mean)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x - self.mean).tanh() + self.other.get_buffer("mean")
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.5)
        return y


class Spectral(nn.Module):
    """A norm whose power iteration has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class Late(nn.Module):
    """Changes a large buffer, and not from the beginning."""

    large: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls = 0
        self.register_buffer("large", torch.zeros(1 << 19))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            self.large += 1
        y: Tensor = self.linear(x)
        return y


def state_after_steps(stage: nn.Module, memory: Memory) -> list[dict[str, Tensor]]:
    def rank_fn(rank: int, num_ranks: int) -> dict[str, Tensor]:
        stages = [copy.deepcopy(stage) for _ in range(num_ranks)]
        model = DualPipe(stages, config=DualPipeConfig(memory_optimization=memory))
        x = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            model.step(x[rank], num_chunks=4, criterion=F.mse_loss, labels=(x[1 - rank],))
        grads = {
            f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None
        }
        return model.state_dict() | grads

    return run_ranks(rank_fn, 2)


@pytest.mark.filterwarnings("ignore:.*running_mean:UserWarning")
@pytest.mark.parametrize("kind", [Normed, Counting, Centered, Spectral])
def test_buffers_of_a_loop_by_hand(kind: type[nn.Module]) -> None:
    stage = kind()
    plain = state_after_steps(stage, "none")
    for rank, found in enumerate(state_after_steps(stage, "activation_checkpoint")):
        assert found.keys() == plain[rank].keys()
        for name, value in found.items():
            assert torch.equal(value, plain[rank][name]), (rank, name)


def test_a_change_that_cannot_be_foreseen_is_refused() -> None:
    with pytest.raises(
        PipelineError, match=r"a Late has changed buffers of more than 1 MiB.*'none'"
    ):
        state_after_steps(Late(), "activation_checkpoint")


@pytest.mark.filterwarnings("ignore:.*running_mean:UserWarning")
def test_buffers_of_a_whole_model() -> None:
    model = nn.Sequential(*(Normed() for _ in range(4)))
    batches = [torch.randn(8, WIDTH) for _ in range(3)]

    def rank_fn(rank: int, num_ranks: int, memory: Memory) -> float:
        config = DualPipeConfig(num_stages=2, num_microbatches=4, memory_optimization=memory)
        training = TrainingWrapper(copy.deepcopy(model), config, loss_fn=F.mse_loss)
        for x in batches:
            training.train_step((x, x.sin()))
        return float(training.evaluate((batches[0], batches[1])))

    plain = run_ranks(rank_fn, 2, args=("none",))
    assert run_ranks(rank_fn, 2, args=("activation_checkpoint",)) == plain
