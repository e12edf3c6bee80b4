"""Mistakes in making a pipeline: every rank raises, within seconds, and the next one is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import Outcome, attempt, outcomes
from torch import nn

from dualpipe_ext import DualPipe, DualPipeConfig, DualPipeV, Pipeline, ScheduleError
from dualpipe_ext.schedule import Schedule, plan
from dualpipe_ext.testing import run_ranks

pytestmark = pytest.mark.measures  # failures are told within seconds


def linears(
    *sizes: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[nn.Module]:
    return [nn.Linear(3, size, dtype=dtype, device=device) for size in sizes]


def tied(*, by_data: bool = False) -> list[nn.Module]:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    if by_data:
        second.weight = nn.Parameter(first.weight.data)
    else:
        second.weight = first.weight
    return [first, second]


def twice() -> list[nn.Module]:
    (module,) = linears(3)
    return [module, module]


@dataclass(frozen=True)
class Wrong:
    """``make(rank)`` raises ``error`` on ``culprits`` (None: on all), PipelineError elsewhere."""

    make: Callable[[int], object]
    parts: tuple[str, ...]
    num_ranks: int = 2
    culprits: tuple[int, ...] | None = None
    error: str = "ValueError"


WRONG = {
    "odd number of ranks": Wrong(
        lambda rank: DualPipe(linears(3, 3)), ("dualpipe", "num_ranks is 3", "even", "use 4"), 3
    ),
    "a single rank": Wrong(
        lambda rank: DualPipe(linears(3, 3)), ("dualpipe", "num_ranks is 1", "even", "use 2"), 1
    ),
    "stages on two devices": Wrong(
        lambda rank: DualPipe([nn.Linear(3, 3), nn.Linear(3, 3, device="meta" if rank else None)]),
        ("parameters of rank 1 are on cpu and meta", "stages [1, 0] to one device"),
        culprits=(1,),
    ),
    "stages without values": Wrong(
        lambda rank: DualPipe(linears(3, 3, device="meta" if rank else "cpu")),
        ("weight of stage 1 (rank 1) is on the meta device", "to_empty(device=...)", "load"),
        culprits=(1,),
    ),
    "a buffer without values, and no copying": Wrong(
        lambda rank: Pipeline([nn.BatchNorm1d(3, affine=False, device="meta")], "1f1b"),
        ("running_mean of stage", "is on the meta device, without a value"),
    ),
    "unknown schedule": Wrong(
        lambda rank: Pipeline(linears(3), "1f2b"), ("1f2b", "dualpipe", "1f1b", "zb1p")
    ),
    "a schedule that is none": Wrong(
        lambda rank: Pipeline(linears(3), 7),  # type: ignore[arg-type]
        ("schedule must be a name", "int"),
        error="TypeError",
    ),
    "too few modules": Wrong(
        lambda rank: DualPipe(linears(3)), ("1 modules were given", "needs 2", "stages [")
    ),
    "too few modules on one rank": Wrong(
        lambda rank: DualPipe(linears(*([3] * (1 + rank)))),
        ("1 modules were given", "needs 2 on rank 0", "[0, 1]"),
        culprits=(0,),
    ),
    "too many modules": Wrong(
        lambda rank: DualPipeV(linears(3, 3, 3)), ("3 modules were given", "needs 2")
    ),
    "two modules for 1f1b": Wrong(
        lambda rank: Pipeline(linears(3, 3), "1f1b"), ("2 modules were given", "needs 1")
    ),
    "the same module twice": Wrong(
        lambda rank: DualPipe(twice() if rank == 1 else linears(3, 3)),
        ("the same module was given twice", "rank 1", "[1, 0]"),
        culprits=(1,),
    ),
    "no modules at all": Wrong(
        lambda rank: DualPipe([nn.Linear(2, 2), torch.relu]),  # type: ignore[list-item]
        ("modules must be nn.Modules", "builtin_function_or_method"),
        error="TypeError",
    ),
    "mirrored parameters of different shapes": Wrong(
        lambda rank: DualPipe(linears(3, 3) if rank == 0 else linears(4, 3)),
        ("stage 1 differs", "ranks 0 and 1", "(3, 3)", "(4, 3)", "same module"),
    ),
    "mirrored parameters of different types": Wrong(
        lambda rank: DualPipe(linears(3, 3, dtype=torch.float64 if rank == 0 else torch.float32)),
        ("differs between its copies", "ranks 0 and 1", "float64", "float32", "same module"),
    ),
    "a tie on one rank alone": Wrong(
        lambda rank: DualPipe(tied() if rank == 0 else linears(3, 3)),
        ("differs between its copies", "weight", "shared with the other stage"),
    ),
    "two parameters in one memory": Wrong(
        lambda rank: DualPipe(tied(by_data=True)),
        ("weight of stage", "two parameters in one memory", "module.weight = other.weight"),
    ),
    "a mirrored parameter too few": Wrong(
        lambda rank: DualPipe([nn.Linear(3, 3), nn.Linear(3, 3, bias=rank == 0)]),
        ("differs", "ranks 0 and 1", "2 parameters against 1"),
    ),
    "a schedule for more ranks": Wrong(
        lambda rank: Pipeline(linears(3), plan("1f1b", 4, 8)),
        ("for 4 ranks", "group has 2"),
    ),
    "schedules that differ": Wrong(
        lambda rank: Pipeline(linears(3), "1f1b" if rank == 0 else "zb1p"),
        ("schedule", "'1f1b' (loop", "rank 0", "'zb1p' (loop", "rank 1", "alike"),
    ),
    "configurations that differ": Wrong(
        lambda rank: DualPipe(linears(3, 3), config=DualPipeConfig(lookahead=rank)),
        ("DualPipeConfig.lookahead: 0 on rank 0, 1 on rank 1", "alike"),
    ),
    "batch dimensions that differ": Wrong(
        lambda rank: DualPipe(linears(3, 3), rank), ("batch_dim", "0 on rank 0", "1 on rank 1")
    ),
    "a mapping for threads": Wrong(
        lambda rank: DualPipe(linears(3, 3), rank_mapping=[1, 0]), ("rank_mapping", "threads")
    ),
    "a group that is none": Wrong(
        lambda rank: DualPipe(linears(3, 3), process_group="world"),  # type: ignore[arg-type]
        ("process_group", "str"),
        error="TypeError",
    ),
}


def make_wrong(rank: int, num_ranks: int, name: str) -> tuple[Outcome, str]:
    """How the wrong pipeline went, and the one after it."""
    outcome = attempt(WRONG[name].make, rank)
    if num_ranks % 2:
        return outcome, ""
    pipeline = DualPipe(linears(3, 3))
    x = torch.ones(2, 3)

    def criterion(y: torch.Tensor) -> torch.Tensor:
        return y.sum()

    after = attempt(pipeline.step, x, num_chunks=4, criterion=criterion, labels=())
    return outcome, after.text


def check(name: str, results: list[Outcome]) -> None:
    wrong = WRONG[name]
    for rank, result in enumerate(results):
        outcome, after = result.value
        assert after == ""
        assert outcome.seconds < 5.0
        if wrong.culprits is None or rank in wrong.culprits:
            assert outcome.is_a(wrong.error), f"rank {rank}: {outcome.error}: {outcome.text}"
        else:
            assert outcome.error == "PipelineError", f"rank {rank}: {outcome.error}"
            assert f"rank {wrong.culprits[0]}" in outcome.text
        for part in wrong.parts:
            assert part in outcome.text, f"rank {rank}: no {part!r} in: {outcome.text}"


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pipelines(name: str) -> None:
    check(name, outcomes(make_wrong, WRONG[name].num_ranks, args=(name,)))


def test_no_group_at_all() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        DualPipe(linears(3, 3))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"num_microbatches": -1}, ValueError, "num_microbatches=-1: it must be at least 0"),
        ({"lookahead": 1.5}, TypeError, "lookahead=1.5: it must be an int"),
        ({"bucket_bytes": 0}, ValueError, "bucket_bytes=0: it must be at least 1"),
        ({"bucket_bytes": 1 << 70}, ValueError, r"it must be less than 2\*\*62"),
        ({"lookahead": 10**12}, ValueError, r"lookahead=10+: it must be less than 2\*\*31"),
        ({"timeout": 0.0}, ValueError, "timeout=0.0: .* above 0"),
        ({"mirror_init": "copy"}, ValueError, "'copy': choose 'broadcast', 'check' or 'none'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        DualPipeConfig(**settings)


def test_a_malformed_line_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0B0\n1F0,1X0\n")
    with pytest.raises(ScheduleError, match="line 2, column 6: expected one of F, B") as raised:
        Schedule.from_csv(path)
    assert "1X0" in str(raised.value)


def test_a_schedule_of_forwards_alone_cannot_train(tmp_path: Path) -> None:
    path = tmp_path / "forwards.csv"
    path.write_text("\ufeff0F0,0F1\n1F0,1F1\n", encoding="utf-8")  # a spreadsheet's mark

    def rank_fn(rank: int, num_ranks: int) -> Outcome:
        pipeline = Pipeline(linears(3), Schedule.from_csv(path))
        x = torch.ones(4, 3)
        given = (x,) if rank == 0 else (None,)
        keywords = {"num_chunks": 2, "criterion": nn.functional.mse_loss, "labels": (x,)}
        with torch.no_grad():
            pipeline.step(*given, num_chunks=2)
        return attempt(pipeline.step, *given, **keywords if rank else {"num_chunks": 2})

    for outcome in run_ranks(rank_fn, 2):
        assert outcome.error == "ValueError", outcome
        assert "'forwards' has no backwards" in outcome.text and "cannot train" in outcome.text


def test_a_schedule_of_ones_own_has_its_own_number_of_microbatches() -> None:
    def rank_fn(rank: int, num_ranks: int) -> None:
        pipeline = Pipeline(linears(3), plan("1f1b", 2, 6))
        x = torch.ones(8, 3) if rank == 0 else None
        labels = () if rank == 1 else None
        pipeline.step(x, num_chunks=8, criterion=lambda y: y.sum(), labels=labels)

    for outcome in outcomes(rank_fn, 2):
        assert outcome.is_a("ValueError")
        assert "6 micro-batches" in outcome.text and "num_chunks=8" in outcome.text
