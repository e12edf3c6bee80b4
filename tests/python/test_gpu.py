"""Messages over NCCL on one GPU, which all ranks share (NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1)."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from gpu_ranks import (
    CUDA,
    NCCL,
    a_stage_that_fails_once,
    allocations_of_steps,
    steps_without_synchronizing,
)
from parity import Job, check_job

from dualpipe_ext.testing import run_ranks

pytestmark = pytest.mark.gpu

JOB = Job("attention", "dualpipe", 4, 8, config=NCCL, device=CUDA)


def job(schedule: str, num_ranks: int, dtype: torch.dtype = torch.float32) -> Job:
    return Job(JOB.case, schedule, num_ranks, 2 * num_ranks, dtype=dtype, config=NCCL, device=CUDA)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "1f1b", "zb1p"])
def test_parity_of_threads(schedule: str, num_ranks: int) -> None:
    check_job(job(schedule, num_ranks))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_parity_of_processes(num_ranks: int) -> None:
    check_job(job("dualpipe", num_ranks), "processes")


def test_parity_in_float64() -> None:
    check_job(job("dualpipe", 4, torch.float64))


@pytest.mark.parametrize("case", ["tied", "many", "mixed", "odd", "checkpoint"])
def test_parity_of_other_models(case: str) -> None:
    check_job(Job(case, "dualpipe", 4, 8, config=NCCL, device=CUDA))


def test_parity_where_messages_travel_in_host_memory() -> None:
    check_job(Job(JOB.case, "dualpipe", 4, 8, device=CUDA))


def test_the_host_never_waits_for_the_device() -> None:
    assert run_ranks(steps_without_synchronizing, 4, args=(JOB,)) == [True] * 4


def test_memory_is_level() -> None:
    for reserved in run_ranks(allocations_of_steps, 4, args=(JOB,)):
        assert len(set(reserved[2:])) == 1, reserved


@pytest.mark.parametrize("ranks", ["threads", "processes"])
def test_a_failure_ends_all_ranks_and_the_next_step_works(
    ranks: Literal["threads", "processes"],
) -> None:
    for endings in run_ranks(a_stage_that_fails_once, 4, ranks, args=(JOB,)):
        assert endings[0] == endings[2] == "fine", endings
        assert "out of luck" in endings[1], endings
