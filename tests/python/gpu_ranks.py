"""What the ranks of test_gpu.py run: importable by name, as started processes need it."""

from __future__ import annotations

from typing import Any

import torch
from parity import Job, own_batch, own_stages

from dualpipe_ext import DualPipeConfig, Pipeline

CUDA = "cuda:0"
NCCL: dict[str, Any] = {"transport": "nccl", "timeout": 60.0}


class Stepper:
    """A pipeline on the GPU and the step that it runs."""

    def __init__(self, rank: int, job: Job) -> None:
        stages = own_stages(job, rank)
        self.pipeline = Pipeline(stages, job.schedule, config=DualPipeConfig(**job.config))
        self.job = job
        self.inputs, self.labels = own_batch(job.plan(), rank, job.microbatches())

    def step(self) -> torch.Tensor | None:
        """One training step; the losses."""
        loss, _ = self.pipeline.step(
            *self.inputs,
            num_chunks=self.job.num_chunks,
            criterion=self.job.what().criterion,
            labels=self.labels,
        )
        return loss


def steps_without_synchronizing(rank: int, num_ranks: int, job: Job) -> bool:
    """Steps in which nothing may make the host wait for the device."""
    stepper = Stepper(rank, job)
    stepper.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            stepper.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def allocations_of_steps(rank: int, num_ranks: int, job: Job) -> list[int]:
    """Bytes that torch has reserved after each of a few steps."""
    stepper = Stepper(rank, job)
    reserved = []
    for _ in range(6):
        stepper.step()
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    return reserved


def a_stage_that_fails_once(rank: int, num_ranks: int, job: Job) -> list[str]:
    """What each of three steps ended in, where the middle one fails on the last rank."""
    stepper = Stepper(rank, job)
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of luck")

    endings = []
    for number in range(3):
        hook = None
        if number == 1 and rank == num_ranks - 1:
            hook = stepper.pipeline.module[0].register_forward_pre_hook(fail)
        try:
            stepper.step()
            torch.cuda.synchronize()
            endings.append("fine")
        except RuntimeError as error:
            endings.append(f"{type(error).__name__}: {error}")
        if hook is not None:
            hook.remove()
    return endings
