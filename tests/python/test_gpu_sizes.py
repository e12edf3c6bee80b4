"""Two, four and eight ranks that share one GPU; over NCCL, processes where threads would be too many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from gpu_ranks import ON_CPU, TIME_LIMIT_S, WANTED, gpu_job, ranks_in_threads, run_jobs
from parity import check_jobs

from dualpipe_ext.testing import run_ranks

pytestmark = pytest.mark.gpu
Ranks = Literal["threads", "processes"]
Jobs = list[tuple[str, torch.dtype]]

ALL: Jobs = [
    (schedule, dtype)
    for schedule in ("dualpipe", "dualpipev")
    for dtype in (torch.float32, torch.bfloat16)
]


def sizes(transport: str) -> Iterator[tuple[str, Ranks, int, Jobs]]:
    """Eight processes that take turns on a GPU have no time for more than one pipeline."""
    for num_ranks in (2, 4, 8):
        if transport != "nccl" or num_ranks <= ranks_in_threads(transport):
            yield transport, "threads", num_ranks, ALL
        else:
            yield transport, "processes", num_ranks, [("dualpipe", torch.float32)]
            yield transport, "processes", num_ranks, [("dualpipev", torch.bfloat16)]


@pytest.mark.parametrize(
    ("transport", "ranks", "num_ranks", "what"),
    [size for transport in (["host"] if ON_CPU else WANTED) for size in sizes(transport)],
)
def test_sizes(transport: str, ranks: Ranks, num_ranks: int, what: Jobs) -> None:
    jobs = [
        gpu_job(transport, "bias", schedule, num_ranks, dtype=dtype) for schedule, dtype in what
    ]
    check_jobs(jobs, run_ranks(run_jobs, num_ranks, ranks, (jobs,), timeout=TIME_LIMIT_S))
