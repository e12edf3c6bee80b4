"""Ranks as processes that share one GPU: what they compute, and what they do when one is killed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from gpu_mirrors import summed_while_the_device_is_busy, summed_while_the_host_is_busy
from gpu_ranks import (
    DEVICE,
    ON_CPU,
    TIME_LIMIT_S,
    TRANSPORTS,
    a_stage_that_fails_once,
    check_more_buckets_than_a_channel_takes,
    die_on_the_device,
    gpu_job,
    over_nccl_alone,
    run_jobs,
    trained_in_one_piece,
    trained_side_by_side,
)
from parity import Job, check_jobs, check_results, unsplit

from dualpipe_ext.testing import run_ranks

pytestmark = pytest.mark.gpu


@TRANSPORTS
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_parity(transport: str, num_ranks: int) -> None:
    jobs = [
        gpu_job(transport, "attention", num_ranks=num_ranks),
        gpu_job(transport, "bias", num_ranks=num_ranks, dtype=torch.bfloat16),
        gpu_job(transport, "late", num_ranks=num_ranks),
        gpu_job(transport, "late", num_ranks=num_ranks, sync="within"),
        gpu_job(transport, "attention", num_ranks=num_ranks, sync="within"),
        gpu_job(transport, "tied", num_ranks=num_ranks, sync="within"),
        gpu_job(transport, "dropout", num_ranks=num_ranks, config={"seed": 7}),
        gpu_job(transport, "tied", "dualpipev", num_ranks=num_ranks),
    ]
    check_jobs(jobs, run_ranks(run_jobs, num_ranks, "processes", (jobs,), timeout=TIME_LIMIT_S))


@TRANSPORTS
def test_a_script_that_says_nccl_and_no_more(transport: str, tmp_path: Path) -> None:
    """Its messages go over NCCL where ranks have a GPU each, as they say here, and else by the host."""
    expected = transport if transport == "nccl" else "host"
    job = Job("attention", "dualpipe", 4, 8, device=DEVICE, sync="within")
    args = (job, str(tmp_path), expected == "nccl")
    found = run_ranks(over_nccl_alone, 4, "processes", args, timeout=TIME_LIMIT_S)
    check_results(job, [result for result, _, _ in found], unsplit(job))
    assert [chosen for _, chosen, _ in found] == [expected] * 4
    told = [[text for text in texts if "share a GPU" in text] for _, _, texts in found]
    assert [len(texts) for texts in told] == [int(transport == "copy"), 0, 0, 0], told


@TRANSPORTS
def test_pipelines_side_by_side(transport: str, tmp_path: Path) -> None:
    expected = trained_in_one_piece()
    args = (transport, str(tmp_path))
    for losses in run_ranks(trained_side_by_side, 4, "processes", args, timeout=TIME_LIMIT_S):
        assert losses == pytest.approx(expected, rel=1e-4)


@TRANSPORTS
def test_a_stage_is_summed_while_another_is_computed(transport: str) -> None:
    see = [summed_while_the_host_is_busy] + [summed_while_the_device_is_busy] * (not ON_CPU)
    for each in see:
        assert run_ranks(each, 2, "processes", (transport,), timeout=TIME_LIMIT_S) == [True, True]


@TRANSPORTS
def test_more_buckets_than_a_channel_takes_messages(transport: str) -> None:
    check_more_buckets_than_a_channel_takes(transport, "processes")


@TRANSPORTS
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_failure_ends_all_ranks_and_the_next_step_works(
    transport: str, in_backward: bool
) -> None:
    job = gpu_job(transport, "attention", num_ranks=2)
    args = (job, in_backward)
    for endings in run_ranks(a_stage_that_fails_once, 2, "processes", args, timeout=TIME_LIMIT_S):
        assert endings[0] == endings[2] == "fine", endings
        assert "out of luck" in endings[1], endings


@TRANSPORTS
def test_a_rank_that_is_killed(transport: str, tmp_path: Path) -> None:
    """The others say so within seconds, and then end by themselves."""
    with pytest.raises(RuntimeError, match="rank 1 died with exit code -9"):
        run_ranks(
            die_on_the_device, 4, "processes", (transport, str(tmp_path)), timeout=TIME_LIMIT_S
        )
    ended_at = time.time()
    for rank in (0, 2, 3):
        error, text, seconds, written_at = torch.load(tmp_path / str(rank))
        assert error == "PipelineError" and "rank 1" in text, text
        assert seconds < 12.0
        assert ended_at - written_at < 8.0, "a process that reported did not end"
