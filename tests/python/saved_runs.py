"""A training run that is saved half-way, and what becomes of it on other numbers of ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loops import make_batch, make_gpt, make_scheduler, token_loss
from torch import Tensor, nn
from torch.optim import Optimizer

from dualpipe_ext import DualPipeConfig, Pipeline, TrainingWrapper
from dualpipe_ext.checkpoint import Resumed, load_checkpoint, save_checkpoint

NUM_MICROBATCHES = 16
State = dict[str, Any]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=5e-3, eps=1e-3, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=5e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=5e-3),
    "two groups": lambda p: torch.optim.AdamW(
        [
            {"params": [x for x in p if x.dim() > 1], "weight_decay": 0.1},
            {"params": [x for x in p if x.dim() < 2], "lr": 1e-3, "weight_decay": 0.0},
        ],
        eps=1e-3,
    ),
}


def make_model(other: bool = False) -> nn.Module:
    """Eight blocks with tied embeddings and a buffer; ``other``: of other values."""
    model = make_gpt(8)
    model.blocks[2].register_buffer("mark", torch.arange(3.0))  # type: ignore[index, union-attr]
    if other:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(0.1)
    return model


@dataclass(frozen=True)
class Run:
    """How a run is set up; sent to ranks."""

    optimizer: str = "adamw"
    scaled: bool = False
    is_frozen: bool = False
    schedule: str = "dualpipe"

    def freeze(self, model: nn.Module) -> nn.Module:
        """Of four ranks, two have nothing to train then."""
        if self.is_frozen:
            model.blocks[2:6].requires_grad_(False)  # type: ignore[index]
        return model

    def wrapper(self, model: nn.Module | None = None, device: str | None = None) -> TrainingWrapper:
        return TrainingWrapper(
            self.freeze(make_model() if model is None else model),
            DualPipeConfig(num_microbatches=NUM_MICROBATCHES, schedule=self.schedule),
            OPTIMIZERS[self.optimizer],
            scheduler=make_scheduler,
            scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
            if self.scaled
            else None,
            loss_fn=token_loss,
            reduction="token",
            shifts_labels=False,
            device=device,
        )


def batches(start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    return [make_batch(NUM_MICROBATCHES, seed) for seed in range(start, stop)]


def train(wrapper: TrainingWrapper, start: int, stop: int) -> list[float]:
    return [float(wrapper.train_step(batch)) for batch in batches(start, stop)]


def state_of(pipeline: Pipeline | nn.Module, optimizer: Optimizer) -> State:
    """All values, of every copy of a stage: those of parameters, buffers and the optimizer."""
    state: State = {}
    modules = pipeline.module if isinstance(pipeline, Pipeline) else [pipeline]
    for module in modules:
        state |= {f"model.{name}": value.clone() for name, value in module.state_dict().items()}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            for key, value in optimizer.state.get(parameter, {}).items():
                kept = value.clone() if isinstance(value, Tensor) else value
                state[f"optimizer.{name}.{key}"] = kept
    return state


@dataclass
class Half:
    """What a rank had when it was saved or loaded, and what it came to."""

    before: State
    losses: list[float]
    after: State
    scale: float = 0.0
    rate: float = 0.0
    extra: Any = None
    num_updates: int = 0
    num_steps: int = 0

    def numbers(self) -> list[float]:
        return [*self.losses, self.scale, self.rate, self.num_updates, self.num_steps]


def _go_on(wrapper: TrainingWrapper, resumed: Resumed | None = None) -> Half:
    before = state_of(wrapper.pipeline, wrapper.optimizer)
    losses = train(wrapper, 3, 6)
    scaler = wrapper._trained_by.scaler
    return Half(
        before,
        losses,
        state_of(wrapper.pipeline, wrapper.optimizer),
        scaler.get_scale() if scaler else 0.0,
        wrapper.optimizer.param_groups[0]["lr"],
        resumed.extra if resumed else None,
        wrapper.num_updates,
        wrapper.pipeline.num_steps,
    )


def save_half_way(rank: int, size: int, folder: Path, run: Run) -> Half:
    wrapper = run.wrapper()
    train(wrapper, 0, 3)
    place = wrapper.save_checkpoint(folder, extra={"place": 3})
    assert place == folder / "step-00000003"
    return _go_on(wrapper)


def resume(rank: int, size: int, folder: Path, run: Run) -> Half:
    wrapper = run.wrapper(make_model(other=True))
    return _go_on(wrapper, wrapper.load_checkpoint(folder))


def resume_empty(
    rank: int, size: int, folder: Path, run: Run, empty: nn.Module, device: str | None = "cpu"
) -> Half:
    wrapper = run.wrapper(copy.deepcopy(empty), device)
    return _go_on(wrapper, wrapper.load_checkpoint(folder))


def save_unsplit(folder: Path, run: Run) -> State:
    """A step in a plain loop."""
    model = run.freeze(make_model())
    optimizer = OPTIMIZERS[run.optimizer](list(model.parameters()))
    scheduler = make_scheduler(optimizer)
    text, labels = make_batch(NUM_MICROBATCHES, seed=0)
    logits, nothing = model(text)
    token_loss(logits, nothing, labels).backward()
    optimizer.step()
    scheduler.step()
    save_checkpoint(folder, model, optimizer, scheduler, step=1)
    return state_of(model, optimizer)


def resume_another(rank: int, size: int, folder: Path) -> None:
    """A model of fewer blocks."""
    Run().wrapper(make_gpt(4)).load_checkpoint(folder)


def resume_unsplit(folder: Path, run: Run) -> Half:
    """The checkpoint in a plain loop."""
    model = run.freeze(make_model(other=True))
    optimizer = OPTIMIZERS[run.optimizer](list(model.parameters()))
    scheduler = make_scheduler(optimizer)
    resumed = load_checkpoint(folder, model, optimizer, scheduler)
    before, losses = state_of(model, optimizer), []
    for text, labels in batches(3, 6):
        logits, nothing = model(text)
        loss = token_loss(logits, nothing, labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    rate = optimizer.param_groups[0]["lr"]
    after = state_of(model, optimizer)
    return Half(before, losses, after, 0.0, rate, resumed.extra, resumed.step + 3, 6)


def joined(halves: Sequence[State]) -> State:
    """The states of all ranks in one; both copies of a stage must have the same bits."""
    state: State = {}
    for half in halves:
        check_same({name: state[name] for name in half if name in state}, half, partly=True)
        state |= half
    return state


def check_same(found: State, expected: State, partly: bool = False) -> None:
    """Bit for bit."""
    if not partly:
        assert found.keys() == expected.keys()
    for name, value in found.items():
        wanted = expected[name]
        if isinstance(wanted, Tensor):
            assert torch.equal(value, wanted), name
        else:
            assert value == wanted, name


def check_close(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
