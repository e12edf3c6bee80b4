"""Every planner computes what the unsplit model computes, micro-batch by micro-batch."""

from __future__ import annotations

import pytest
import torch
from models import CASES
from parity import Job, Sync, check_equal, check_job, run_job, unsplit

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])

SIZES = [
    (ranks, chunks) for ranks in (2, 4, 8) for chunks in sorted({2 * ranks, 2 * ranks + 2, 20, 32})
]
# Random numbers belong to a process: see test_processes.py.
THREAD_CASES = [name for name in CASES if "dropout" not in name]
TIED = {"dualpipe", "dualpipev", "zbv"}  # the first and the last stage are on one rank


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize(("num_ranks", "num_chunks"), SIZES)
def test_sizes(schedule: str, num_ranks: int, num_chunks: int) -> None:
    check_job(Job("bias", schedule, num_ranks, num_chunks))
    check_job(Job("tied", schedule, num_ranks, num_chunks, dtype=F64, sync="within"))


@pytest.mark.parametrize("name", THREAD_CASES)
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
@DTYPES
def test_models(name: str, schedule: str, dtype: torch.dtype) -> None:
    if dtype == F64 and not CASES[name].has_float64:
        dtype = F32  # the case fixes its types itself: run it again, with the other sum
    sync: Sync = "after" if dtype == F32 else "within"
    check_job(Job(name, schedule, 4, 10, dtype=dtype, sync=sync))


@pytest.mark.parametrize("name", THREAD_CASES)
def test_models_on_two_ranks(name: str) -> None:
    check_job(Job(name, "dualpipe", 2, 4, sync="within"))
    check_job(Job(name, "dualpipev", 2, 5))


@pytest.mark.parametrize("schedule", ["dualpipev", "1f1b", "zb1p", "zbv", "gpipe"])
@pytest.mark.parametrize("name", ["bias", "attention", "gpt"])
def test_gradients_that_nobody_defers_have_the_bits_of_the_unsplit_model(
    name: str, schedule: str
) -> None:
    """Deferred ones are added within the product, those of two copies half by half."""
    job = Job(name, schedule, 4, 8, config={"split_weight_gradients": False})
    expected = unsplit(job).gradients
    for result in run_job(job):
        for stage, gradients in result.gradients.items():
            check_equal(tuple(gradients.values()), tuple(expected[stage].values()), str(stage))


@pytest.mark.parametrize(
    ("schedule", "num_ranks", "num_chunks", "stages_per_rank"),
    [
        ("1f1b", 2, 4, 0),
        ("1f1b", 4, 4, 0),
        ("1f1b", 8, 20, 0),
        ("gpipe", 2, 3, 0),
        ("gpipe", 4, 10, 0),
        ("gpipe", 8, 16, 0),
        ("zb1p", 2, 4, 0),
        ("zb1p", 4, 10, 0),
        ("zb1p", 8, 20, 0),
        ("interleaved_1f1b", 2, 4, 2),
        ("interleaved_1f1b", 4, 8, 2),
        ("interleaved_1f1b", 2, 6, 3),
        ("interleaved_1f1b", 8, 16, 2),
        ("zbv", 2, 4, 0),
        ("zbv", 4, 8, 0),
        ("zbv", 8, 20, 0),
    ],
)
def test_planners(schedule: str, num_ranks: int, num_chunks: int, stages_per_rank: int) -> None:
    for name in ("bias", "gpt", "odd") + (("tied",) if schedule in TIED else ()):
        check_job(Job(name, schedule, num_ranks, num_chunks, stages_per_rank))
    check_job(Job("attention", schedule, num_ranks, num_chunks, stages_per_rank, dtype=F64))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb1p", "interleaved_1f1b", "zbv"])
@pytest.mark.parametrize(
    "name", ["checkpoint", "checkpoint_reentrant", "autocast", "many", "mixed"]
)
def test_models_of_other_planners(schedule: str, name: str) -> None:
    stages = 2 if schedule == "interleaved_1f1b" else 0
    check_job(Job(name, schedule, 4, 8, stages))


@pytest.mark.parametrize("rows", [(3, 3, 3, 2, 3, 3, 2, 2), (2, 1, 1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("schedule", ["dualpipe", "1f1b"])
def test_a_batch_that_does_not_come_out_even(schedule: str, rows: tuple[int, ...]) -> None:
    even = schedule == "dualpipe"  # each end cuts its own half
    whole = (3, 3, 3, 3, 3, 3, 3, 2) if rows[0] == 3 else rows
    check_job(Job("attention", schedule, 4, 8, rows=rows if even else whole))


@pytest.mark.parametrize("lookahead", [0, 1, 5])
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_any_lookahead_gives_the_same(schedule: str, lookahead: int) -> None:
    check_job(Job("bias", schedule, 4, 8, config={"lookahead": lookahead}))


@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_without_deferred_weight_gradients(schedule: str) -> None:
    check_job(Job("attention", schedule, 4, 8, config={"split_weight_gradients": False}))


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 30])
def test_any_bucket_gives_the_same(bucket_bytes: int) -> None:
    job = Job("tied", "dualpipe", 4, 8, sync="within", config={"bucket_bytes": bucket_bytes})
    check_job(job)


@pytest.mark.parametrize("schedule", ["dualpipev", "1f1b", "gpipe", "interleaved_1f1b"])
def test_a_single_rank(schedule: str) -> None:
    stages = 2 if schedule == "interleaved_1f1b" else 0
    check_job(Job("attention", schedule, 1, 4, stages))
