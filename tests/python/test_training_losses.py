"""Which loss a training loop takes, and what it knows of its labels and its mean."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import make_batch
from plain_models import VOCABULARY
from torch import Tensor, nn

from dualpipe_ext import TrainingWrapper, setup_dual_pipe
from dualpipe_ext.adapters import get_model_adapter
from dualpipe_ext.testing import run_ranks
from dualpipe_ext.training.losses import choose_loss, cross_entropy, next_token_loss

ROWS = 12


class SomeLMHeadModel(nn.Sequential):
    """By its name and its module a language model of transformers."""

    __module__ = "transformers.models.some"


class OurModel(SomeLMHeadModel):
    pass


class OursForCausalLM(nn.Sequential):
    """By its name alone."""


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("kind", [SomeLMHeadModel, OurModel, OursForCausalLM, nn.Sequential])
def test_language_models_learn_the_next_token(kind: type[nn.Sequential], is_cut: bool) -> None:
    layers = [
        nn.Embedding(VOCABULARY, 8),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
        nn.Linear(8, VOCABULARY),
    ]
    model = kind(*layers)
    text = make_batch(8, seed=1)[0]
    labels = text.clone()
    labels[:, -2:] = -100
    with torch.no_grad():
        loss = next_token_loss if issubclass(kind, SomeLMHeadModel) else cross_entropy
        expected = float(loss(model(text), labels))

    def train(rank: int, size: int) -> float:
        own = copy.deepcopy(model)
        parts = get_model_adapter(own).partition(size, show=False) if is_cut else own
        return float(TrainingWrapper(parts, setup_dual_pipe(own, size)).train_step((text, labels)))

    assert run_ranks(train, 2) == pytest.approx([expected] * 2, rel=1e-5)


def shifting_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """As users write it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("kind", [OurModel, nn.Sequential])
@pytest.mark.parametrize("shifts", [None, False, True])
def test_a_loss_that_shifts_counts_no_first_label(
    kind: type[nn.Sequential], shifts: bool | None
) -> None:
    model = kind(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(8, VOCABULARY))
    text = make_batch(8, seed=1)[0]
    labels = text.clone()
    for row in range(8):
        labels[row, 1 + row % 5 :] = -100  # some rows have no more than the first label
    with torch.no_grad():
        expected = float(shifting_loss(model(text), labels))

    def train(rank: int, size: int) -> float:
        own = copy.deepcopy(model)
        config = setup_dual_pipe(own, size)
        options: dict[str, Any] = {
            "loss_fn": shifting_loss,
            "reduction": "token",
            "shifts_labels": shifts,
        }
        return float(TrainingWrapper(own, config, **options).train_step((text, labels)))

    if shifts is None:
        with pytest.raises(ValueError, match="give shifts_labels=True if it shifts"):
            run_ranks(train, 2)
    else:
        is_right = run_ranks(train, 2) == pytest.approx([expected] * 2, rel=1e-5)
        assert is_right == shifts


def test_what_is_known_of_a_loss_is_not_told_otherwise() -> None:
    with pytest.raises(ValueError, match="leaves out the first label of each row; leave shifts"):
        choose_loss(True, next_token_loss, "token", -100, shifts_labels=False)
    with pytest.raises(ValueError, match="counts the first label of each row; leave shifts"):
        choose_loss(True, nn.CrossEntropyLoss(), "token", -100, shifts_labels=True)
    assert choose_loss(False, shifting_loss, "token", -100).is_shifted is None


class ShiftingLoss(nn.CrossEntropyLoss):
    """Does something else than the class that it is derived from."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().forward(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_loss_is_not_known_by_what_it_is_derived_from() -> None:
    assert choose_loss(False, ShiftingLoss(), "token", -100).is_shifted is None
    assert choose_loss(False, ShiftingLoss(), "token", -100, shifts_labels=True).is_shifted


@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_loss_of_nobody_shifts_as_it_is_told(is_causal: bool, shifts: bool) -> None:
    loss = choose_loss(is_causal, None, None, -100, shifts_labels=shifts)
    logits, labels = torch.randn(2, 5, 4), torch.randint(4, (2, 5))
    expected = next_token_loss if shifts else cross_entropy
    torch.testing.assert_close(loss.function(logits, labels), expected(logits, labels))
    assert loss.units((labels,), 2) == (8 if shifts else 10)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0, 4.0])])
def test_the_reduction_of_a_loss_that_sums_is_known(weight: Tensor | None) -> None:
    sums = nn.CrossEntropyLoss(reduction="sum", weight=weight)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    x, labels = torch.randn(ROWS, 4), torch.randint(4, (ROWS,))

    def train(rank: int, size: int) -> float:
        own = copy.deepcopy(model)
        wrapper = TrainingWrapper(own, setup_dual_pipe(own, size), loss_fn=sums)
        return float(wrapper.train_step((x, labels)))

    expected = float(sums(model(x), labels).detach())
    assert run_ranks(train, 2) == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("ignored", [-100, 0])
def test_padding_is_refused_in_a_mean_over_rows_of_a_loss_that_counts_labels(ignored: int) -> None:
    """Means over the labels of micro-batches, weighed by rows, are no mean over anything."""
    loss = choose_loss(False, nn.CrossEntropyLoss(ignore_index=ignored), "mean", -100)
    assert loss.units([torch.tensor([1, 2])], 2) == 2
    with pytest.raises(ValueError, match=f"the value {ignored}, .*choose reduction='token'"):
        loss.units([torch.tensor([1, ignored])], 2)


class Distance(nn.Module):
    """A loss that is kept for itself, such as one with a large model in it."""

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs, labels)

    def __deepcopy__(self, memo: dict[int, Any]) -> Distance:
        raise AssertionError("a loss was copied")


def test_losses_are_not_copied() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.ones(4, 2)

    def train(rank: int, size: int) -> float:
        own = copy.deepcopy(model)
        wrapper = TrainingWrapper(own, setup_dual_pipe(own, size), loss_fn=Distance())
        return float(wrapper.train_step((x, x)))

    assert run_ranks(train, 2) == pytest.approx([F.mse_loss(model(x), x).item()] * 2)
