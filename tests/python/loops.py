"""The same training loop over a pipeline and in one piece; what both of them came to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from adapted import outputs_of
from models import _random
from plain_models import GPT, TIME, VOCABULARY
from torch import Tensor, nn

from dualpipe_ext import Pipeline, TrainingWrapper, setup_dual_pipe
from dualpipe_ext.testing import run_ranks

IGNORED = -100


def make_gpt(num_blocks: int = 4, tied: bool = True) -> nn.Module:
    """The same numbers every time."""
    with _random, torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return GPT(num_blocks, tied)


def make_long_gpt() -> nn.Module:
    """For schedules that have many stages, the first and the last on different ranks."""
    return make_gpt(8, tied=False)


def token_loss(logits: Tensor, _: Tensor | None, labels: Tensor) -> Tensor:
    """The mean over tokens that are not padding."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def row_loss(logits: Tensor, _: None, labels: Tensor) -> Tensor:
    """The mean over rows; every label counts."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=0))


def sum_loss(logits: Tensor, _: None, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=0), reduction="sum")


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mean": row_loss,
    "sum": sum_loss,
    "token": token_loss,
}


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW that does not blow rounding up to whole steps where a gradient is zero but for it."""
    return torch.optim.AdamW(parameters, lr=5e-3, eps=1e-3)


def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)


def make_batch(rows: int, seed: int, padded: bool = True) -> tuple[Tensor, Tensor]:
    """Text and its next tokens; padding differs from row to row, one row has nothing else."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCABULARY, (rows, TIME), generator=generator)
    labels = (text * 3 + 1) % VOCABULARY
    if padded:
        lengths = torch.randint(1, TIME + 1, (rows, 1), generator=generator)
        lengths[0] = 0
        labels = labels.masked_fill(torch.arange(TIME) >= lengths, IGNORED)
    return text, labels


@dataclass(frozen=True)
class Loop:
    """A training run.

    Attributes:
        rows: of each batch, in turn.
        options: of the wrapper.
        inf_at: this step of the optimizer finds an infinite gradient of ``inf_in``.
    """

    reduction: str = "mean"
    rows: tuple[int, ...] = (8,)
    num_steps: int = 8
    accumulation_steps: int = 1
    max_grad_norm: float | None = None
    schedule: str = "dualpipe"
    scheduled: bool = False
    scaled: bool = False
    inf_at: int = 0
    inf_in: str = "blocks.0.norm1.weight"
    make: Callable[[], nn.Module] = make_gpt
    settings: dict[str, Any] = field(default_factory=dict)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        rows = [self.rows[i % len(self.rows)] for i in range(self.num_steps)]
        return [make_batch(count, seed) for seed, count in enumerate(rows)]

    def scaler(self) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10) if self.scaled else None


@dataclass
class Result:
    losses: list[float]
    state: dict[str, Tensor]
    norms: list[float]
    scale: float
    rate: float


def units(loop: Loop, labels: Tensor) -> int:
    if loop.reduction == "token":
        return int((labels != IGNORED).sum())
    return len(labels) if loop.reduction == "mean" else 1


def train_unsplit(loop: Loop) -> Result:
    """The loop as anybody writes it; an accumulation is one large batch."""
    model = loop.make()
    optimizer, scaler = make_optimizer(model.parameters()), loop.scaler()
    scheduler = make_scheduler(optimizer) if loop.scheduled else None
    batches, loss_fn = loop.batches(), LOSSES[loop.reduction]
    losses, norms = [], []
    for start in range(0, len(batches), loop.accumulation_steps):
        group = batches[start : start + loop.accumulation_steps]
        total = sum(units(loop, labels) for _, labels in group)
        for text, labels in group:
            loss = loss_fn(*outputs_of(model(text)), labels)
            losses.append(float(loss.detach().double()))
            if loop.reduction != "sum":
                loss = loss * units(loop, labels) / total
            (scaler.scale(loss) if scaler else loss).backward()
        if loop.inf_at == start // loop.accumulation_steps + 1:
            grad = model.get_parameter(loop.inf_in).grad
            assert grad is not None
            grad.fill_(float("inf"))
        if scaler is not None:
            scaler.unscale_(optimizer)
        if loop.max_grad_norm is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), loop.max_grad_norm)))
        before = scaler.get_scale() if scaler else 0.0
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None and not (scaler and scaler.get_scale() < before):
            scheduler.step()
        optimizer.zero_grad()
    scale = scaler.get_scale() if scaler else 0.0
    return Result(losses, model.state_dict(), norms, scale, optimizer.param_groups[0]["lr"])


def train_rank(rank: int, size: int, loop: Loop) -> Result:
    model = loop.make()
    stages = size if loop.schedule != "dualpipev" else 2 * size
    settings = {"num_microbatches": 2 * size, "schedule": loop.schedule, **loop.settings}
    config = setup_dual_pipe(model, num_stages=stages, **settings)
    scaler = loop.scaler()
    wrapper = TrainingWrapper(
        model,
        config,
        optimizer=make_optimizer,
        scheduler=make_scheduler if loop.scheduled else None,
        loss_fn=LOSSES[loop.reduction],
        reduction=loop.reduction,  # type: ignore[arg-type]
        shifts_labels=False,
        max_grad_norm=loop.max_grad_norm,
        accumulation_steps=loop.accumulation_steps,
        scaler=scaler,
    )
    losses, norms = [], []
    for step, batch in enumerate(loop.batches(), 1):
        if rank == 0 and step == loop.inf_at * loop.accumulation_steps:
            make_infinite(wrapper.pipeline, loop.inf_in)
        losses.append(float(wrapper.train_step(batch)))
        if step % loop.accumulation_steps == 0 and wrapper.grad_norm is not None:
            norms.append(float(wrapper.grad_norm))
    scale = scaler.get_scale() if scaler else 0.0
    # The mirror of each stage is left to the other rank: both are compared.
    state = {
        f"{stage}:{name}": value.clone()
        for stage, module in zip(wrapper.pipeline.stages, wrapper.pipeline.module, strict=True)
        for name, value in module.state_dict().items()
    }
    return Result(losses, state, norms, scale, wrapper.optimizer.param_groups[0]["lr"])


def make_infinite(pipeline: Pipeline, name: str) -> None:
    """The next gradient of a parameter of this rank: in one copy of one stage."""
    parameter = next(p for n, p in pipeline.module.named_parameters() if n.endswith(name))

    def spoil(_: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.fill_(float("inf"))
        handle.remove()

    handle = parameter.register_post_accumulate_grad_hook(spoil)


def check_loop(loop: Loop, sizes: Sequence[int] = (2, 4), ranks: str = "threads") -> None:
    """Losses within 1e-5 of the unsplit run's, parameters within 1e-4, on every rank."""
    expected = train_unsplit(copy.deepcopy(loop))
    assert abs(expected.losses[0] - expected.losses[-1]) > 1e-2, "nothing was learnt"
    for size in sizes:
        results = run_ranks(train_rank, size, ranks, (loop,))  # type: ignore[arg-type]
        for result in results:
            _check(result, expected)
        names = {name.partition(":")[2] for result in results for name in result.state}
        assert names == set(expected.state)


def _check(found: Result, expected: Result) -> None:
    close = torch.testing.assert_close
    close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-5, atol=0.0)
    close(torch.tensor(found.norms), torch.tensor(expected.norms), rtol=1e-4, atol=0.0)
    assert (found.scale, found.rate) == (expected.scale, expected.rate)
    for name, value in found.state.items():
        wanted = expected.state[name.partition(":")[2]]
        close(value, wanted, rtol=1e-4, atol=1e-5, msg=name)
