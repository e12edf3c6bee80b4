"""A run in progress: the model, its optimizer and how far they are."""

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.data import Corpus, draw_batch
from gpt.models import Model
from gpt.optim import build_optimizer, learning_rate
from gpt.options import Options


@dataclass(frozen=True)
class StepRecord:
    """What a step gave.

    Attributes:
        step: Its number, from 1.
        losses: Loss of each micro-batch, in nats a byte.
        learning_rate: That it was made with.
        gradient_norm: Before clipping.
    """

    step: int
    losses: list[float]
    learning_rate: float
    gradient_norm: float

    @property
    def loss(self) -> float:
        """Mean loss of the step."""
        return statistics.fmean(self.losses)


class Training:
    """Everything that a step changes. The batches follow from the seed and the step alone."""

    def __init__(self, options: Options, model: Model, corpus: Corpus) -> None:
        self.options = options
        self.model = model
        self.corpus = corpus
        self.optimizer = build_optimizer(model.parameters(), options)
        self.step_count = 0

    def step(self) -> StepRecord:
        """Train on the next batch."""
        rate = learning_rate(self.step_count, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.model.losses(*self._batch(self.corpus.train, self.step_count))
        norm = self.model.clip(self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_count += 1
        return StepRecord(self.step_count, losses.tolist(), rate, norm)

    def evaluate(self, batches: int = 1) -> float:
        """Return the mean loss over held-out batches, the same ones at every call."""
        with torch.no_grad():
            losses = [
                self.model.losses(*self._batch(self.corpus.held_out, index)).mean()
                for index in range(batches)
            ]
        return float(torch.stack(losses).mean())

    def _batch(self, text: Tensor, index: int) -> tuple[Tensor, Tensor]:
        options = self.options
        seed = options.seed << 32 | index
        return draw_batch(text, options.batch_rows, options.model.context, seed)
