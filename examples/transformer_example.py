"""Train a whole transformer with DualPipe, beside the same training in one piece.

python examples/transformer_example.py --num-gpus 2

The text is that of Python's own library. Where there are not so many GPUs, ranks are processes on
the CPU.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from dualpipe_ext import TrainingWrapper, setup_dual_pipe
from dualpipe_ext.testing import run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpt.data import draw_batch, load_corpus
from gpt.model import GPTConfig, GPTStage, loss_fn
from side_by_side import print_losses


@dataclass(frozen=True)
class Run:
    """What both trainings have in common."""

    layers: int
    width: int
    steps: int
    rows: int
    data: Path | None

    def model(self) -> nn.Module:
        """A GPT in one piece; the same weights every time."""
        config = GPTConfig(layers=self.layers, width=self.width)
        return GPTStage(config, range(self.layers))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Windows of text, and the bytes that follow in them; the same every time."""
        text = load_corpus(self.data).train
        context = GPTConfig().context
        return [draw_batch(text, self.rows, context, seed) for seed in range(self.steps)]


def make_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """AdamW."""
    return AdamW(parameters, lr=3e-3, betas=(0.9, 0.95))


def make_scheduler(optimizer: Optimizer) -> LRScheduler:
    """A warm-up."""
    return LinearLR(optimizer, start_factor=0.1, total_iters=10)


def check(run: Run, num_ranks: int) -> None:
    """Raise a ValueError, before ranks are started, where they could not train."""
    needed = setup_dual_pipe(run.model(), num_stages=num_ranks).num_microbatches
    if run.rows < needed:
        raise ValueError(
            f"a batch of {run.rows} rows has no {needed} micro-batches: use --rows {needed}"
        )


def train_rank(rank: int, num_ranks: int, run: Run) -> list[float]:
    """One rank of the pipeline; returns the loss of each step."""
    model = run.model()
    config = setup_dual_pipe(model, num_stages=num_ranks)
    training = TrainingWrapper(
        model,
        config,
        optimizer=make_optimizer,
        scheduler=make_scheduler,
        loss_fn=loss_fn,
        max_grad_norm=1.0,
        device=f"cuda:{rank}" if torch.cuda.device_count() >= num_ranks else None,
    )
    return [float(training.train_step(batch)) for batch in run.batches()]


def train_unsplit(run: Run) -> list[float]:
    """The same without a pipeline."""
    model = run.model()
    optimizer = make_optimizer(list(model.parameters()))
    scheduler = make_scheduler(optimizer)
    losses = []
    for text, following in run.batches():
        loss = loss_fn(model(text), following)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main(
    num_gpus: Annotated[int, typer.Option(min=2, help="Ranks; an even number.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
    layers: Annotated[int, typer.Option(min=2, help="Transformer blocks.")] = 4,
    width: Annotated[int, typer.Option(min=4, help="Size of the residual stream.")] = 64,
    rows: Annotated[int, typer.Option(min=1, help="Sequences of a batch.")] = 32,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Python files to read, not the stdlib."),
    ] = None,
) -> None:
    """Train a GPT over a pipeline and in one piece, and compare the losses."""
    run = Run(layers, width, steps, rows, data)
    try:
        check(run, num_gpus)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    where = "GPUs" if torch.cuda.device_count() >= num_gpus else "CPU ranks"
    print(f"training on {num_gpus} {where} ...", flush=True)
    by_rank = run_ranks(train_rank, num_gpus, "processes", args=(run,))
    print_losses(by_rank[0], train_unsplit(run))


if __name__ == "__main__":
    typer.run(main)
