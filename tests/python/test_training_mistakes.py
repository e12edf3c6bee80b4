"""Mistakes in training loops: a clear error on every rank, and the next step works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import make_batch, make_gpt, make_optimizer, token_loss
from outcomes import Outcome, attempt, outcomes
from plain_models import Deciding, Skipping
from torch import nn
from torch.optim import LBFGS, SGD
from torch.optim.lr_scheduler import StepLR

from dualpipe_ext import DualPipeConfig, TrainingWrapper
from dualpipe_ext.compat.batches import BatchPipeline
from dualpipe_ext.compat.ranks import TrainerRanks
from dualpipe_ext.groups import resolve_group
from dualpipe_ext.testing import run_ranks
from dualpipe_ext.training.batches import BatchReader
from dualpipe_ext.training.replicas import Replicas

pytestmark = pytest.mark.measures  # failures are told within seconds

TEXT, LABELS = make_batch(8, seed=1)
CONFIG = DualPipeConfig(num_microbatches=4, timeout=20.0)


@dataclass(frozen=True)
class Wrong:
    """``options`` of the wrapper or ``step`` of it, on the culprits (None: on all ranks).

    They get ``error``, with all of ``parts`` in it; the others a PipelineError with the same.
    """

    parts: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    step: Callable[[TrainingWrapper], Any] | None = None
    good: Callable[[TrainingWrapper], Any] | None = None
    culprits: tuple[int, ...] | None = None
    error: str = "ValueError"


def failing_loader() -> Iterator[Any]:
    yield TEXT, LABELS
    raise OSError("could not read batch 1: no such file")


def batch(*given: Any, **keywords: Any) -> Callable[[TrainingWrapper], Any]:
    return lambda wrapper: wrapper.train_step(given[0] if len(given) == 1 else given, **keywords)


def make(**options: Any) -> TrainingWrapper:
    given = {
        "model": make_gpt(),
        "config": CONFIG,
        "optimizer": make_optimizer,
        "loss_fn": token_loss,
        "reduction": "token",
        "shifts_labels": False,
        **{
            name: each() if name in ("model", "scheduler") else each
            for name, each in options.items()
        },
    }
    return TrainingWrapper(**given)


def with_main_grads(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    return model


CONSTRUCTION = {
    "another number of stages": Wrong(
        ("num_stages=4", "2 ranks", "num_stages=2"), {"config": DualPipeConfig(num_stages=4)}
    ),
    "too many stages": Wrong(("num_partitions=2", "has 1 layers"), {"model": lambda: make_gpt(1)}),
    "a model that looks at values": Wrong(
        ("Deciding cannot be traced", "register_adapter"), {"model": Deciding}
    ),
    "a skip connection": Wrong(
        ("Skipping has a skip connection across stages", "used behind blocks.2", "balance="),
        {"model": Skipping, "config": DualPipeConfig(balance=[2, 2])},
    ),
    "too few micro-batches": Wrong(
        ("num_microbatches is 2", "use 4"), {"config": DualPipeConfig(num_microbatches=2)}
    ),
    "an unknown reduction": Wrong(
        ("reduction='average'", "'mean', 'sum' or 'token'"), {"reduction": "average"}
    ),
    "a loss that sums, of a mean": Wrong(
        ("the loss_fn has reduction='sum'", "reduction='token'"),
        {"loss_fn": nn.CrossEntropyLoss(reduction="sum")},
    ),
    "a loss that takes means, of a sum": Wrong(
        ("the loss_fn has reduction='mean'", "give both 'sum'"),
        {"loss_fn": nn.MSELoss(), "reduction": "sum"},
    ),
    "a loss that does neither": Wrong(
        ("the loss_fn has reduction='none'", "the loss_fn 'mean'"),
        {"loss_fn": partial(F.cross_entropy, reduction="none")},
    ),
    "a loss that weighs classes": Wrong(
        ("weighs classes", "reduction='sum'"),
        {"loss_fn": nn.CrossEntropyLoss(weight=torch.ones(4)), "reduction": "mean"},
    ),
    "a loss that leaves out other labels": Wrong(
        ("leaves out labels of 0", "others than -100", "the same ignore_index"),
        {"loss_fn": nn.CrossEntropyLoss(ignore_index=0)},
    ),
    "a loss with parameters": Wrong(
        ("has 2 parameters, and no stage trains them", "the model's last layers"),
        {"loss_fn": nn.Linear(2, 2)},
    ),
    "a reduction of the loss that is built in": Wrong(
        ("reduction='sum'", "loss_fn of your own"), {"loss_fn": None, "reduction": "sum"}
    ),
    "a loss that is no function": Wrong(
        ("loss_fn must be a function", "float"), {"loss_fn": 0.5}, error="TypeError"
    ),
    "no accumulation": Wrong(("accumulation_steps=0", "at least 1"), {"accumulation_steps": 0}),
    "half an accumulation": Wrong(
        ("accumulation_steps=0.5", "an int"), {"accumulation_steps": 0.5}, error="TypeError"
    ),
    "no norm": Wrong(("max_grad_norm=0", "above 0", "None"), {"max_grad_norm": 0}),
    "a norm that is no number": Wrong(
        ("max_grad_norm='1'", "a number"), {"max_grad_norm": "1"}, error="TypeError"
    ),
    "options for an optimizer that is made": Wrong(
        ("options lr", "a SGD that is already made"),
        {"optimizer": SGD(make_gpt().parameters(), lr=0.1), "optimizer_options": {"lr": 1.0}},
    ),
    "a scaler without an optimizer": Wrong(
        ("optimizer=None", "a scaler for one"),
        {"optimizer": None, "scaler": torch.amp.GradScaler("cpu")},
    ),
    "an optimizer on one rank alone": Wrong(
        ("ranks differ in optimizer", "None on rank 1"),
        {"optimizer": None},
        culprits=(1,),
        error="both",
    ),
    "a scaler of gradients that it does not find": Wrong(
        ("does not unscale main_grad", "bfloat16"),
        {"model": lambda: with_main_grads(make_gpt()), "scaler": torch.amp.GradScaler("cpu")},
    ),
    "no type for autocast": Wrong(
        ("autocast=torch.float32", "bfloat16"), {"autocast": torch.float32}
    ),
    "accumulations that differ": Wrong(
        ("ranks differ in accumulation_steps", "2 on rank 0", "1 on rank 1"),
        {"accumulation_steps": 2},
        culprits=(0,),
        error="both",
    ),
    "no optimizer": Wrong(
        ("optimizer= must be", "found str"), {"optimizer": "adam"}, culprits=(1,), error="TypeError"
    ),
    "a function that makes none": Wrong(
        ("optimizer= must be", "found list"), {"optimizer": list}, error="TypeError"
    ),
    "an optimizer that needs a closure": Wrong(
        ("LBFGS", "use another"), {"optimizer": LBFGS}, error="TypeError"
    ),
    "an optimizer of another model": Wrong(
        ("none of this rank's parameters", "the very model", "lambda parameters"),
        {"optimizer": SGD(make_gpt().parameters(), lr=0.1)},
        culprits=(0,),
    ),
    "a scheduler of another optimizer": Wrong(
        ("scheduler is one of another optimizer", "lambda optimizer"),
        {"scheduler": lambda: StepLR(SGD(make_gpt().parameters(), lr=0.1), 1)},
    ),
}

STEPS = {
    "an unknown name": Wrong(
        ("'txt'", "neither an input", "did you mean 'text'?", "label_names="),
        step=batch({"txt": TEXT, "labels": LABELS}),
    ),
    "no inputs": Wrong(("no inputs",), step=batch({"labels": LABELS})),
    "no labels": Wrong(("reduction='token'", "has none"), step=batch(TEXT)),
    "too few rows": Wrong(
        ("3 rows", "4 micro-batches", "drop_last=True"), step=batch(TEXT[:3], LABELS[:3])
    ),
    "no rows": Wrong(("at least 1", "found [0]"), step=batch(TEXT[:0], LABELS[:0])),
    "labels of fewer rows": Wrong(
        ("equally many rows", "found [7, 8]"), step=batch(TEXT, LABELS[:7]), culprits=(1,)
    ),
    "a scalar": Wrong(("0 dimensions", "dim 0"), step=batch(TEXT, torch.tensor(1))),
    "no tensors": Wrong(
        ("tensors or None", "found list"), step=batch(TEXT.tolist(), LABELS), error="TypeError"
    ),
    "no batch": Wrong(("a batch is", "found int"), step=batch(3), error="TypeError", culprits=(0,)),
    "nothing that counts": Wrong(
        ("no label of the batch counts", "-100"), step=batch(TEXT, torch.full_like(LABELS, -100))
    ),
    "different batches": Wrong(
        ("rank 1 was given another batch than rank 0", "halves=True"),
        step=batch(TEXT.flip(0), LABELS),
        culprits=(1,),
        error="both",
    ),
    "batches of different sizes": Wrong(
        ("leaves the model with", "has labels of", "every rank the same batch"),
        step=batch(TEXT[:5], LABELS[:5]),
        culprits=(1,),
        error="PipelineError",  # where the loss fails
    ),
    "fewer batches than the others": Wrong(
        ("the data ends after 1 batches on rank 1, and goes on on rank 0",),
        step=lambda wrapper: wrapper.evaluate([(TEXT, LABELS)]),
        good=lambda wrapper: wrapper.evaluate([(TEXT, LABELS)] * 2),
        culprits=(1,),
        error="both",
    ),
    "a loader that fails": Wrong(
        ("could not read batch 1: ", "no such file"),
        step=lambda wrapper: wrapper.evaluate(failing_loader()),
        good=lambda wrapper: wrapper.evaluate([(TEXT, LABELS)] * 2),
        culprits=(1,),
        error="OSError",
    ),
    "no batches": Wrong(("no batch to evaluate",), step=lambda wrapper: wrapper.evaluate(iter(()))),
    "nothing to evaluate": Wrong(
        ("none with a label that counts",),
        step=lambda wrapper: wrapper.evaluate((TEXT, torch.full_like(LABELS, -100))),
    ),
    "halves of different sizes": Wrong(
        ("enters with", "TrainingWrapper.own_rows"),
        step=batch(TEXT[:4], LABELS[:2], halves=True),
        error="both",
        culprits=(1,),
    ),
    "half a batch without labels": Wrong(
        ("rank 1 was given no labels",), step=batch(TEXT[:4], None, halves=True), culprits=(1,)
    ),
    "half a batch that is too small": Wrong(
        ("rank 0 was given inputs of 1 rows", "2 micro-batches there"),
        step=batch(TEXT[:1], LABELS[:4], halves=True),
        culprits=(0,),
    ),
}


def is_culprit(wrong: Wrong, rank: int) -> bool:
    return wrong.culprits is None or rank in wrong.culprits


def construct(rank: int, _: int, wrong: Wrong) -> Outcome:
    found = attempt(make, **(wrong.options if is_culprit(wrong, rank) else {}))
    make()
    return found


def step(rank: int, _: int, wrong: Wrong, name: str) -> Outcome:
    wrapper = make()
    halves = name.startswith("hal")
    good = batch(TEXT[:4], LABELS[:4], halves=True) if halves else batch(TEXT, LABELS)
    assert wrong.step is not None
    found = attempt(wrong.step if is_culprit(wrong, rank) else wrong.good or good, wrapper)
    before = float(wrapper.evaluate((TEXT, LABELS)))
    for _ in range(3):
        wrapper.train_step((TEXT, LABELS))
    assert float(wrapper.evaluate((TEXT, LABELS))) < before
    return found


def check(wrong: Wrong, found: list[Outcome]) -> None:
    for rank, outcome in enumerate(found):
        is_mutual = wrong.error == "both"
        own = is_culprit(wrong, rank) or is_mutual
        error = "ValueError" if is_mutual else wrong.error if own else "PipelineError"
        assert outcome.is_a(error), f"rank {rank}: {outcome}"
        assert all(part in outcome.text for part in wrong.parts), f"rank {rank}: {outcome.text}"
        assert outcome.seconds < 5.0


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_wrong_options(name: str) -> None:
    check(CONSTRUCTION[name], run_ranks(construct, 2, args=(CONSTRUCTION[name],)))


@pytest.mark.parametrize("name", STEPS)
def test_wrong_batches(name: str) -> None:
    check(STEPS[name], run_ranks(step, 2, args=(STEPS[name], name)))


def test_labels_that_do_not_count_need_a_reduction() -> None:
    """Left out, it would be a mean over rows, and padding would change what a token weighs."""

    def train(rank: int, size: int) -> object:
        return make(reduction=None).train_step((TEXT, LABELS))

    for outcome in outcomes(train, 2):
        assert outcome.is_a("ValueError") and "choose reduction='token'" in outcome.text, outcome


def test_models_that_differ_are_told_once() -> None:
    """Their own stages may be what each rank was given weights for, so that it is no error."""

    def train(rank: int, size: int) -> None:
        model = make_gpt()
        if rank > 1:
            with torch.no_grad():
                list(model.parameters())[-1][-1] += 1
        make(model=lambda: model, config=DualPipeConfig())

    with pytest.warns(UserWarning) as told:
        run_ranks(train, 4)
    (text,) = {str(warning.message) for warning in told}
    assert "rank 0 has other weights than that of ranks 2, 3" in text
    assert "torch.manual_seed()" in text
    assert [warning.filename for warning in told] == [__file__]


def test_trainers_are_told_of_models_that_differ() -> None:
    """On two ranks, where both copies of each stage are made equal before anything is trained."""

    def make_pipeline(rank: int, size: int) -> None:
        model = make_gpt()
        with torch.no_grad():
            next(model.parameters()).add_(rank)
        nowhere: Any = None  # threads have no group of torch's
        ranks = TrainerRanks(resolve_group(None, None), Replicas(None), nowhere)
        BatchPipeline(model, DualPipeConfig(), ranks, torch.device("cpu"))

    with pytest.warns(UserWarning, match="rank 0 has other weights than that of rank 1"):
        run_ranks(make_pipeline, 2)


def test_models_without_values_are_not_compared() -> None:
    """Not even by what was in the memory that they are given, which is all of them on two ranks."""

    def train(rank: int, size: int) -> int:
        model = nn.Sequential(*(nn.Linear(4, 4, device="meta") for _ in range(4)))
        make(model=lambda: model, config=DualPipeConfig(), device="cpu", optimizer=None)
        return sum(parameter.is_meta for parameter in model.parameters())

    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "to_empty", with_other_values)
        assert run_ranks(train, 2) == [0, 0]


def with_other_values(module: nn.Module, *, device: str, recurse: bool = True) -> nn.Module:
    """Memory as it may be: with what nobody else has there."""
    made: nn.Module = module._apply(lambda t: torch.rand(t.shape, dtype=t.dtype, device=device))
    return made


def test_labels_keep_their_places() -> None:
    reader = BatchReader(("text",), ("first", "second"))
    with pytest.raises(ValueError, match="has no first, but other labels; give all labels"):
        reader.read({"text": TEXT, "second": LABELS})
    assert reader.read({"text": TEXT, "second": LABELS}, partly=True).labels == (None, LABELS)
    assert reader.read({"text": TEXT}).labels == ()
    assert reader.read_inputs({"text": TEXT, "second": LABELS}).labels == ()


def test_training_without_an_optimizer() -> None:
    def train(rank: int, size: int) -> object:
        wrapper = make(optimizer=None, scaler=torch.amp.GradScaler("cpu", enabled=False))
        assert wrapper.evaluate((TEXT, LABELS)) > 0
        return wrapper.train_step((TEXT, LABELS))

    for outcome in outcomes(train, 2):
        assert outcome.is_a("ValueError") and "there is no optimizer" in outcome.text, outcome


def test_copies_that_would_be_trained_otherwise_are_refused() -> None:
    """Those of different stages may be: layers have learning rates of their own."""

    def train(rank: int, size: int, factor: Callable[[int], float]) -> None:
        make(
            config=DualPipeConfig(timeout=20.0),
            optimizer=lambda parameters: SGD(parameters, lr=0.1 * factor(rank)),
        )

    for outcome in outcomes(train, 4, args=(lambda rank: 1.0 + rank,)):
        assert outcome.is_a("ValueError"), outcome
        assert "trained with lr=0.2, " in outcome.text and "against" in outcome.text
    for outcome in outcomes(train, 4, args=(lambda rank: 1.0 + min(rank, 3 - rank),)):
        assert outcome.error == "", outcome


def test_optimizers_of_named_parameters_are_alike() -> None:
    """Their groups have the names in the order of the rank, which is that of the mirror reversed."""

    def train(rank: int, size: int) -> float:
        def named(parameters: Any) -> Any:
            return SGD([(f"p{i}", p) for i, p in enumerate(parameters)], lr=0.1)

        return float(make(optimizer=named, config=DualPipeConfig()).train_step((TEXT, LABELS)))

    assert len(set(run_ranks(train, 4))) == 1
