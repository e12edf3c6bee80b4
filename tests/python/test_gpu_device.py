"""What a GPU alone can show: that its host never waits, that memory is level, that races are seen."""

from __future__ import annotations

import threading

import pytest
import torch
from gpu_ranks import (
    TRANSPORTS,
    allocations_until_level,
    gpu_job,
    ranks_in_threads,
    steps_without_synchronizing,
)
from models import late

from dualpipe_ext.testing import run_ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("times_device", [False, True])
@TRANSPORTS
def test_the_host_never_waits_for_the_device(transport: str, times_device: bool) -> None:
    job = gpu_job(transport, "attention")
    barrier = threading.Barrier(job.num_ranks, timeout=40.0)
    run_ranks(steps_without_synchronizing, job.num_ranks, args=(job, barrier.wait, times_device))


@TRANSPORTS
def test_memory_is_level(transport: str) -> None:
    # 0.4 MB a message: a leak soon shows.
    job = gpu_job(transport, "attention", rows=(2048,) * 2 * ranks_in_threads(transport))
    barrier = threading.Barrier(job.num_ranks, timeout=40.0)
    for counts in run_ranks(allocations_until_level, job.num_ranks, args=(job, barrier.wait, 8)):
        assert len(set(counts[-8:])) == 1, counts


def test_a_reader_that_does_not_wait_sees_the_poison() -> None:
    """Or the tests of late stages would say nothing."""
    x = torch.ones(1024, device="cuda")
    hasty, patient = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    y = late(x, 0.2)
    with torch.cuda.stream(hasty):
        torch.cuda._sleep(90_000_000)  # until the poison is there, and not the result
        early = y.clone()
    patient.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(patient):
        right = y.clone()
    torch.cuda.synchronize()
    assert early.isnan().all() and torch.equal(right, x)


def test_ranks_that_are_threads_have_streams_of_their_own() -> None:
    """On the default one, each would wait for the kernels of the others."""

    def stream_and_sum(rank: int, num_ranks: int) -> tuple[int, torch.Tensor]:
        torch.cuda._sleep(10_000_000)
        return torch.cuda.current_stream().cuda_stream, before + rank

    torch.cuda._sleep(10_000_000)
    before = torch.ones(4, device="cuda") * 2
    found = run_ranks(stream_and_sum, 4)
    default = torch.cuda.default_stream().cuda_stream
    assert len({stream for stream, _ in found} | {default}) == 5
    assert [value.tolist() for _, value in found] == [[2.0 + rank] * 4 for rank in range(4)]
