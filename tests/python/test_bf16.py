"""In bf16 the losses have the bits of the unsplit model, and gradients differ by rounding alone."""

from __future__ import annotations

import pytest
import torch
from parity import Job, check_gradients, check_job, rounding_of, run_unsplit, unsplit

BF16 = torch.bfloat16


@pytest.mark.parametrize("name", ["bias", "attention", "gpt", "tied", "odd", "late"])
@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(2, 4), (4, 10)])
def test_parity(name: str, num_ranks: int, num_chunks: int) -> None:
    check_job(Job(name, "dualpipe", num_ranks, num_chunks, dtype=BF16))


@pytest.mark.parametrize("num_chunks", [4, 8, 16])
@pytest.mark.parametrize("times", [0, 2])
def test_a_microbatch_that_is_not_counted_once_is_found(num_chunks: int, times: int) -> None:
    job = Job("bias", "dualpipe", 2, num_chunks, dtype=BF16)
    expected = unsplit(job)
    stages, microbatches = job.stages(), job.microbatches()
    run_unsplit(stages, microbatches[1:] + microbatches[:1] * times, job.what())
    grads = {name: p.grad for name, p in stages[0].named_parameters()}
    rounding = rounding_of(expected.magnitudes[0], num_chunks)
    with pytest.raises(AssertionError, match=r"stage 0, .*: .* > "):
        check_gradients(grads, expected.gradients[0], BF16, "stage 0", rounding)
