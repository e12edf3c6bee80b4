"""Models of transformers train by their own names and with their own loss."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import ARCHITECTURES, Architecture
from torch import Tensor
from torch.optim import AdamW

from dualpipe_ext import TrainingWrapper, setup_dual_pipe
from dualpipe_ext.testing import run_ranks

NUM_STEPS = 5


def batches(architecture: Architecture) -> list[dict[str, Tensor]]:
    """As a collator gives them: padding is -100 in the labels, which are not shifted."""
    made = []
    for seed in range(NUM_STEPS):
        inputs = architecture.inputs(rows=5, seed=seed)
        if architecture.is_vision:
            made.append({**inputs, "labels": torch.arange(5) % 3})
            continue
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        made.append({**inputs, "labels": labels})
    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trains_with_the_loss_of_the_model(name: str) -> None:
    architecture = ARCHITECTURES[name]
    data = batches(architecture)
    if name == "bert":
        data = [{k: v for k, v in batch.items() if k != "position_ids"} for batch in data]
    made = architecture.make()  # once: threads share the generator of random numbers
    model = copy.deepcopy(made)
    optimizer = AdamW(model.parameters(), lr=5e-3, eps=1e-3)
    expected = []
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        expected.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()

    def train(rank: int, size: int) -> list[float]:
        whole = copy.deepcopy(made)
        config = setup_dual_pipe(whole, num_stages=size)
        own = AdamW(whole.parameters(), lr=5e-3, eps=1e-3)
        training = TrainingWrapper(whole, config, optimizer=own)
        return [float(training.train_step(batch)) for batch in data]

    for losses in run_ranks(train, 2):
        assert losses == pytest.approx(expected, rel=1e-5)
