"""What a training loop takes and gives: batches of all kinds, evaluation, optimizers, mistakes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from loops import LOSSES, make_batch, make_gpt, make_optimizer, token_loss
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from dualpipe_ext import TrainingWrapper, setup_dual_pipe
from dualpipe_ext.adapters import get_model_adapter
from dualpipe_ext.schedule import plan
from dualpipe_ext.testing import run_ranks
from dualpipe_ext.training.losses import next_token_loss
from dualpipe_ext.training.rows import RowPlan

ROWS = 12


def make(size: int, model: nn.Module | None = None, **options: Any) -> TrainingWrapper:
    model = model or make_gpt()
    given = {"optimizer": make_optimizer, "loss_fn": token_loss, "reduction": "token", **options}
    if given["loss_fn"] is token_loss:
        given["shifts_labels"] = False
    return TrainingWrapper(model, setup_dual_pipe(model, num_stages=size), **given)


def unsplit_loss(text: Tensor, labels: Tensor, model: nn.Module | None = None) -> float:
    with torch.no_grad():
        logits, _ = (model or make_gpt()).eval()(text)
        return float(token_loss(logits, None, labels))


def half_of(wrapper: TrainingWrapper, text: Tensor, labels: Tensor) -> Any:
    entering, leaving = wrapper.own_rows(len(text))
    if not entering:
        return None
    return text[entering.start : entering.stop], labels[leaving.start : leaving.stop]


GIVEN: dict[str, Callable[[TrainingWrapper, Tensor, Tensor], dict[str, Any]]] = {
    "a tuple": lambda w, x, y: {"batch": (x, y)},
    "a list": lambda w, x, y: {"batch": [x, y]},
    "a pair of tuples": lambda w, x, y: {"batch": ((x,), (y,))},
    "names": lambda w, x, y: {"batch": {"labels": y, "text": x}},
    "halves": lambda w, x, y: {"batch": half_of(w, x, y), "halves": True},
}


@pytest.mark.parametrize("how", GIVEN)
def test_batches_of_all_kinds(how: str) -> None:
    batch = make_batch(ROWS + 1, seed=1)

    def train(rank: int, size: int) -> list[float]:
        wrapper = make(size)
        given = GIVEN[how](wrapper, *batch)
        data, halves = given["batch"], given.get("halves", False)
        evaluated = wrapper.evaluate(data, halves=halves)
        return [float(evaluated), float(wrapper.train_step(data, halves=halves))]

    for losses in run_ranks(train, 4):
        assert losses == pytest.approx([unsplit_loss(*batch)] * 2, rel=1e-5)


@pytest.mark.parametrize("all_of_them", [False, True])
def test_partitions_of_your_own(all_of_them: bool) -> None:
    batch = make_batch(ROWS, seed=1)

    def train(rank: int, size: int) -> float:
        partitions = get_model_adapter(make_gpt()).partition(size, balance=[0, 1, 2, 1])
        stages = partitions if all_of_them else [partitions[rank], partitions[size - 1 - rank]]
        wrapper = TrainingWrapper(
            stages,
            None,
            SGD,
            optimizer_options={"lr": 0.1},
            loss_fn=token_loss,
            reduction="token",
            shifts_labels=False,
        )
        assert wrapper.optimizer.param_groups[0]["lr"] == 0.1
        return float(wrapper.train_step(batch))

    assert run_ranks(train, 4) == pytest.approx([unsplit_loss(*batch)] * 4, rel=1e-5)


def test_the_same_loss_without_a_loss_function() -> None:
    """The cross-entropy over tokens; here of a model that returns nothing else."""

    class Logits(type(make_gpt())):  # type: ignore[misc]
        def forward(self, text: Tensor) -> Tensor:
            logits: Tensor = super().forward(text)[0]
            return logits

    def model() -> nn.Module:
        found = make_gpt()
        found.__class__ = Logits
        return found

    text, labels = make_batch(ROWS, seed=1)

    def train(rank: int, size: int) -> float:
        wrapper = make(size, model(), loss_fn=None, reduction=None)
        return float(wrapper.train_step((text, labels)))

    assert run_ranks(train, 2) == pytest.approx([unsplit_loss(text, labels)] * 2, rel=1e-5)


@pytest.mark.parametrize("reduction", LOSSES)
def test_evaluates_all_batches_as_one(reduction: str) -> None:
    """Whatever their sizes: 3 rows are fewer than the micro-batches, 1 row has no labels."""
    loader = [make_batch(rows, seed=rows) for rows in (ROWS, 3, 1, 9)]
    whole = (torch.cat([text for text, _ in loader]), torch.cat([labels for _, labels in loader]))
    with torch.no_grad():
        expected = float(LOSSES[reduction](*make_gpt()(whole[0]), whole[1]))

    def evaluate(rank: int, size: int) -> float:
        wrapper = make(size, loss_fn=LOSSES[reduction], reduction=reduction)
        return float(wrapper.evaluate(iter(loader)))

    assert run_ranks(evaluate, 2) == pytest.approx([expected] * 2, rel=1e-5)


def test_evaluation_leaves_no_trace() -> None:
    """Neither in modes, which may differ between modules, nor in gradients or parameters."""
    batch = make_batch(ROWS, seed=1)

    def evaluate(rank: int, size: int) -> None:
        wrapper = make(size)
        stages = wrapper.pipeline.module
        next(m for m in stages.modules() if isinstance(m, nn.Linear)).eval()
        modes = [m.training for m in stages.modules()]
        before = copy.deepcopy(stages.state_dict())
        seen = []
        for module in stages.modules():
            module.register_forward_hook(lambda m, *_: seen.append(m.training))
        wrapper.evaluate(batch)
        wrapper.predict(batch)
        assert seen and not any(seen)
        assert [m.training for m in stages.modules()] == modes and any(modes)
        assert all(torch.equal(before[name], value) for name, value in stages.state_dict().items())
        assert all(parameter.grad is None for parameter in stages.parameters())

    run_ranks(evaluate, 2)


@pytest.mark.parametrize("rows", [ROWS + 1, 3])
def test_predicts_all_rows_at_both_ends(rows: int) -> None:
    text, _ = make_batch(rows, seed=1)
    with torch.no_grad():
        expected = make_gpt()(text)[0]

    def predict(rank: int, size: int) -> Any:
        return make(size).predict(text)

    first, *middle, last = run_ranks(predict, 4)
    assert middle == [None, None]
    for logits, targets in (first, last):
        assert targets is None
        torch.testing.assert_close(logits, expected)


def test_an_optimizer_of_the_whole_model() -> None:
    """Its groups stay, with this rank's parameters; a scheduler that was made of it as well."""
    batch = make_batch(ROWS, seed=1)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        return [{"params": matrices, "weight_decay": 0.3}, {"params": others, "lr": 1e-2}]

    whole = make_gpt()
    optimizer = AdamW(groups(whole), lr=1e-3, eps=1e-3)
    scheduler = StepLR(optimizer, step_size=2)
    for _ in range(4):
        token_loss(whole(batch[0])[0], None, batch[1]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    def train_rank(rank: int, size: int) -> dict[str, Tensor]:
        model = make_gpt()
        own = AdamW(groups(model), lr=1e-3, eps=1e-3)
        wrapper = make(size, model, optimizer=own, scheduler=StepLR(own, step_size=2))
        for _ in range(4):
            wrapper.train_step(batch)
        assert len(own.param_groups) == 2
        assert len(own.state) < len(list(model.parameters()))
        state: dict[str, Tensor] = wrapper.pipeline.module[0].state_dict()
        return state

    for state in run_ranks(train_rank, 4):
        for name, value in state.items():
            wanted = whole.state_dict()[name]
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_a_scheduler_looks_at_the_loss_of_all_that_was_accumulated() -> None:
    small, large = make_batch(ROWS, seed=1), make_batch(2 * ROWS, seed=2)
    text, labels = (torch.cat(pair) for pair in zip(small, large, strict=True))

    def train(rank: int, size: int) -> list[float]:
        wrapper = make(
            size,
            optimizer=lambda p: SGD(p, lr=0.0),
            scheduler=ReduceLROnPlateau,
            accumulation_steps=2,
        )
        scheduler: Any = wrapper.scheduler
        seen = []
        for batch in (small, large, large, small):
            wrapper.train_step(batch)
            seen.append(scheduler.best)
            scheduler.best = float("inf")
        return seen

    expected = pytest.approx(unsplit_loss(text, labels), rel=1e-5)
    for first, second, third, fourth in run_ranks(train, 2):
        assert first == third == float("inf")
        assert second == expected and fourth == expected


def test_a_scheduler_that_looks_at_the_loss() -> None:
    batch = make_batch(ROWS, seed=1)

    def train(rank: int, size: int) -> float:
        wrapper = make(
            size,
            optimizer=lambda p: SGD(p, lr=0.0),
            scheduler=ReduceLROnPlateau,
            scheduler_options={"patience": 1, "factor": 0.5},
        )
        wrapper.optimizer.param_groups[0]["lr"] = 1e-12
        wrapper.scheduler.eps = 0.0  # type: ignore[union-attr]
        for _ in range(3):
            wrapper.train_step(batch)
        rate: float = wrapper.optimizer.param_groups[0]["lr"]
        return rate

    assert run_ranks(train, 2) == [5e-13, 5e-13]


def test_a_rank_without_anything_to_train() -> None:
    """Frozen stages go through clipping, scaling and schedules with the others."""
    batch = make_batch(ROWS, seed=1)

    def freeze(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("blocks.1" in name or "blocks.2" in name)
        return model

    whole = freeze(make_gpt())
    optimizer = make_optimizer([p for p in whole.parameters() if p.requires_grad])
    losses = []
    for _ in range(3):
        loss = token_loss(whole(batch[0])[0], None, batch[1])
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()

    def train(rank: int, size: int) -> list[float]:
        wrapper = make(size, freeze(make_gpt()), scaler=torch.amp.GradScaler("cpu"))
        return [float(wrapper.train_step(batch)) for _ in range(3)]

    for found in run_ranks(train, 4):
        assert found == pytest.approx(losses, rel=1e-5)


def test_autocast() -> None:
    """The loss that the whole model has under autocast, to the rounding of bfloat16."""
    text, labels = make_batch(ROWS, seed=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = float(token_loss(make_gpt()(text)[0], None, labels))

    def train(rank: int, size: int) -> float:
        return float(make(size, autocast=torch.bfloat16).train_step((text, labels)))

    losses = run_ranks(train, 2)
    assert losses == pytest.approx([expected] * 2, rel=4e-3)
    assert losses[0] != pytest.approx(unsplit_loss(text, labels), rel=1e-6)


def test_an_update_ahead_of_time() -> None:
    """The rest of an epoch need not wait for the next one."""
    batch = make_batch(ROWS, seed=1)

    def train(rank: int, size: int) -> list[int]:
        wrapper = make(size, accumulation_steps=4)
        counts = []
        for update in (None, True, None, None, None, None, False):
            wrapper.train_step(batch, update=update)
            counts.append(wrapper.num_updates)
        return counts

    assert run_ranks(train, 2) == [[0, 1, 1, 1, 1, 2, 2]] * 2


def test_layers_that_thaw_are_trained() -> None:
    batches = [make_batch(ROWS, seed=seed) for seed in range(4)]

    def frozen() -> nn.Module:
        model = make_gpt(tied=False).requires_grad_(False)
        model.get_submodule("head").requires_grad_(True)
        return model

    def losses_of(model: nn.Module, step: Callable[[Any], float]) -> list[float]:
        losses = []
        for number, batch in enumerate(batches):
            if number == 2:
                model.requires_grad_(True)
            losses.append(step(batch))
        return losses

    whole = frozen()
    optimizer = make_optimizer(whole.parameters())

    def step_unsplit(batch: tuple[Tensor, Tensor]) -> float:
        loss = token_loss(whole(batch[0])[0], None, batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    expected = losses_of(whole, step_unsplit)

    def train(rank: int, size: int) -> list[float]:
        model = frozen()
        wrapper = make(size, model, optimizer=make_optimizer(model.parameters()))
        return losses_of(model, lambda batch: float(wrapper.train_step(batch)))

    for found in run_ranks(train, 4):
        assert found == pytest.approx(expected, rel=1e-5)


def test_all_ranks_skip_a_step_whose_optimizer_leaves_parameters_out() -> None:
    """The first parameters, those of rank 0 and of its mirror, are others' to train."""

    def train(rank: int, size: int) -> tuple[float, int]:
        model = make_gpt()
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        optimizer = SGD(list(model.parameters())[2:], lr=0.1)
        wrapper = make(size, model, optimizer=optimizer, scaler=scaler)
        if rank == 1:
            *_, last = wrapper.pipeline.parameters()
            last.register_hook(lambda grad: grad * float("inf"))
        wrapper.train_step(make_batch(ROWS, seed=1))
        return scaler.get_scale(), wrapper.num_updates

    assert run_ranks(train, 4) == [(8.0, 0)] * 4


def test_the_next_token_loss_with_settings() -> None:
    text, labels = make_batch(ROWS, seed=1, padded=False)
    for row in range(ROWS):
        labels[row, 1 + row % 5 :] = 0
    with torch.no_grad():
        logits, _ = make_gpt().eval()(text)
        expected = float(next_token_loss(logits, labels, ignore_index=0))
    own = partial(next_token_loss, ignore_index=0)

    def evaluate(rank: int, size: int) -> float:
        with pytest.raises(ValueError, match=r"leaves out labels of 0.*others than -100"):
            make(size, loss_fn=own)
        wrapper = make(size, loss_fn=own, ignore_index=0)
        return float(wrapper.evaluate((text, labels)))

    assert run_ranks(evaluate, 2) == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*will differ between the two copies")
def test_which_rows_come_first_does_not_matter_to_a_batch_norm() -> None:
    """Each copy has taken statistics of its own half of the batch."""

    blocks = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(4))
    whole = nn.Sequential(*blocks)

    def evaluate(rank: int, size: int) -> list[float]:
        model = copy.deepcopy(whole)
        config = setup_dual_pipe(model, num_stages=size)
        wrapper = TrainingWrapper(model, config, SGD, loss_fn=nn.functional.mse_loss)
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)
        wrapper.train_step((x, x))
        return [float(wrapper.evaluate((rows, rows))) for rows in (x, x.flip(0))]

    for forwards, backwards in run_ranks(evaluate, 2):
        assert forwards == pytest.approx(backwards, rel=1e-5)


@pytest.mark.parametrize("schedule", ["dualpipe", "1f1b"])
@pytest.mark.parametrize("learning", [None, 0, 3])
def test_training_nothing_is_warned_of(schedule: str, learning: int | None) -> None:
    """Of one layer on some rank that learns, the loss depends on all ranks."""
    whole = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).requires_grad_(False)
    if learning is not None:
        whole[learning].requires_grad_(True)

    def train(rank: int, size: int) -> None:
        model = copy.deepcopy(whole)
        config = setup_dual_pipe(model, num_stages=size, schedule=schedule)
        wrapper = TrainingWrapper(model, config, SGD, loss_fn=nn.functional.mse_loss)
        x = torch.ones(8, 4)
        wrapper.evaluate((x, x))
        for _ in range(2):
            wrapper.train_step((x, x))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_ranks(train, 4)
    told = [each for each in caught if "nothing is trained" in str(each.message)]
    assert [each.filename for each in told] == ([__file__] if learning is None else [])


@pytest.mark.parametrize("rank", range(4))
def test_a_batch_that_is_too_small_is_refused_where_no_row_enters_too(rank: int) -> None:
    """Else these ranks would start a step that the two ends stay away from."""
    rows = RowPlan.of(plan("dualpipe", num_ranks=4, num_microbatches=8))
    for rows_of in (rows.entering_rows, rows.leaving_rows):
        assert len(rows_of(rank, 8)) == (0 if rank in (1, 2) else 4)
        with pytest.raises(ValueError, match="5 rows, fewer than its 8 micro-batches"):
            rows_of(rank, 5)
