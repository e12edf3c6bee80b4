"""Activation checkpointing changes no number: buffers, too, are changed once a micro-batch."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline, PipelineError, TrainingWrapper
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


class Untraced(nn.Module):
    """Changes buffers in ways that leave no trace in their versions, and makes one in a forward."""

    average: Tensor
    mean: Tensor
    variance: Tensor
    made: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))
        self.inner = nn.Module()
        self.inner.register_buffer("made", None)

    def forward(self, x: Tensor) -> Tensor:
        made = self.inner.get_buffer("made") if self.inner._buffers["made"] is not None else None
        y: Tensor = self.linear(x - self.average) * (1.0 if made is None else made)
        y = F.batch_norm(y - self.mean, self.mean, self.variance, training=True)
        self.inner._buffers["made"] = torch.full((), 1.5)
        self.average.data.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        return y.tanh() + self.average


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
@pytest.mark.parametrize("kind", [Normed, Counting, Centered, Spectral, Untraced])
def test_buffers_of_a_loop_by_hand(kind: type[nn.Module]) -> None:
    stage = kind()
    plain = state_after_steps(stage, "none")
    for rank, found in enumerate(state_after_steps(stage, "activation_checkpoint")):
        assert found.keys() == plain[rank].keys()
        for name, value in found.items():
            assert torch.equal(value, plain[rank][name]), (rank, name)


def test_a_graph_that_is_kept_is_recomputed_twice() -> None:
    """By a hook that differentiates before the step does."""

    def rank_fn(rank: int, num_ranks: int, memory: Memory) -> dict[str, Tensor]:
        config = DualPipeConfig(memory_optimization=memory, split_weight_gradients=False)
        model = Pipeline([copy.deepcopy(stage)], "1f1b", config=config)
        parameters = list(model.parameters())

        def differentiate(loss: Tensor, _: int) -> None:
            torch.autograd.grad(loss, parameters, retain_graph=True)

        model.register_before_backward_hook(differentiate)
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))
        model.step(x, num_chunks=4, criterion=F.mse_loss, labels=(x.sin(),))
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    stage = Centered()
    (plain,), (found,) = (
        run_ranks(rank_fn, 1, args=(m,)) for m in ("none", "activation_checkpoint")
    )
    assert found.keys() == plain.keys() and plain
    for name, value in found.items():
        assert torch.equal(value, plain[name]), name


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
