"""What the ranks of the tests marked `gpu` run: importable by name, as started processes need it.

GPU_CHECK_DEVICE=cpu runs those tests on the CPU, over host memory, to try them out.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from models import _random
from outcomes import attempt
from parity import Job, RankResult, own_batch, own_stages, run_rank, run_unsplit
from places import Place
from process_ranks import Dying
from torch import Tensor, nn

from dualpipe_ext import (
    DualPipe,
    DualPipeConfig,
    Pipeline,
    StepStatistics,
    TraceEvent,
    TrainingWrapper,
    _transport,
    setup_dual_pipe,
)
from dualpipe_ext.adapters import Imbalance, get_model_adapter, report_imbalance
from dualpipe_ext.testing import run_ranks

ON_CPU = os.environ.get("GPU_CHECK_DEVICE") == "cpu"
DEVICE = "cpu" if ON_CPU else "cuda:0"
WANTED = os.environ.get("GPU_CHECK_TRANSPORTS", "copy nccl").split()
TIME_LIMIT_S = 50.0  # of ranks; one of pytest's, of 60, would end the tests behind as well
TRANSPORTS = pytest.mark.parametrize("transport", ["host"] if ON_CPU else WANTED)


def over(transport: str) -> dict[str, Any]:
    """Settings of a pipeline. What hangs on a device has become an error after so many seconds."""
    return {"transport": transport, "timeout": 20.0}


def ranks_in_threads(transport: str) -> int:
    """Four; over NCCL two: in shared hardware queues more were seen to wait for each other."""
    return 2 if transport == "nccl" else 4


def gpu_job(
    transport: str, case: str, schedule: str = "dualpipe", num_ranks: int = 0, **more: Any
) -> Job:
    """A job on the device, with 2P micro-batches; without a number, for ranks that are threads."""
    num_ranks = num_ranks or ranks_in_threads(transport)
    config = over(transport) | more.pop("config", {})
    return Job(case, schedule, num_ranks, 2 * num_ranks, config=config, device=DEVICE, **more)


def warm_up(job: Job) -> None:
    """Has the job's kernels loaded, by a micro-batch on the whole model.

    At its first use one may wait for all that the device is at: in a step, for a message that waits
    for this very rank.
    """
    if not ON_CPU:
        first = job.microbatches()[:1]
        run_unsplit(job.stages(), first, job.what(), device_type=job.device_type)


class Stepper:
    """A pipeline on the device and the step that it runs."""

    def __init__(self, rank: int, job: Job) -> None:
        warm_up(job)
        stages = own_stages(job, rank)
        self.pipeline = Pipeline(stages, job.schedule, config=DualPipeConfig(**job.config))
        self.job = job
        self.inputs, self.labels = own_batch(job.plan(), rank, job.microbatches())

    def step(self, *, sync_gradients: bool = False) -> Tensor | None:
        """One training step; the losses."""
        loss, _ = self.pipeline.step(
            *self.inputs,
            num_chunks=self.job.num_chunks,
            criterion=self.job.what().criterion,
            labels=self.labels,
            sync_gradients=sync_gradients,
        )
        return loss


def finish() -> None:
    """Waits for the rank's own stream."""
    if not ON_CPU:
        torch.cuda.current_stream().synchronize()


def steps_without_synchronizing(
    rank: int, num_ranks: int, job: Job, wait_for_all: Callable[[], object], times_device: bool
) -> None:
    """Steps in which nothing may make the host wait for the device.

    They are issued while the device is at something else, and done when it has yet to begin. The
    mode belongs to the process: it is on while all ranks, its threads, are in these steps.
    """
    stepper = Stepper(rank, job)
    stepper.pipeline.times_device = times_device
    stepper.step(sync_gradients=True)
    finish()
    wait_for_all()
    try:
        torch.cuda.set_sync_debug_mode("error")
        wait_for_all()
        begun = torch.cuda.Event()
        torch.cuda._sleep(6_000_000_000)  # about three seconds
        begun.record()
        stepper.step(sync_gradients=True)  # a second one would fill the stream's queue of launches
        assert not begun.query(), "the host was held up until the device came to these steps"
        wait_for_all()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocations_until_level(
    rank: int, num_ranks: int, job: Job, wait_for_all: Callable[[], object], num_level: int
) -> list[tuple[int, int]]:
    """After each step: how often torch had asked the driver for memory, and what is free.

    Until these were the same for some steps, or 40 are over. Receive buffers of some transports are
    none of torch's; how many sends are under way at once differs from step to step.
    """
    stepper = Stepper(rank, job)
    counts: list[tuple[int, int]] = []
    while len(counts) < 40 and (len(counts) < num_level or len(set(counts[-num_level:])) > 1):
        stepper.step()
        finish()
        wait_for_all()
        num_free_bytes, _ = torch.cuda.mem_get_info()
        counts.append((torch.cuda.memory_stats()["num_device_alloc"], num_free_bytes))
        wait_for_all()  # all ranks see the same
    return counts


def a_stage_that_fails_once(rank: int, num_ranks: int, job: Job, in_backward: bool) -> list[str]:
    """What each of three steps ended in, where the middle one fails on the last rank.

    In an early forward; or in the last backward, when another stage is being summed.
    """
    stepper = Stepper(rank, job)
    last_call = job.num_chunks // 2 if in_backward else 2
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == last_call:
            raise RuntimeError("out of luck")

    endings = []
    for number in range(3):
        hook = None
        if number == 1 and rank == num_ranks - 1:
            upper, lower = stepper.pipeline.module
            if in_backward:
                hook = lower.register_full_backward_pre_hook(fail)
            else:
                hook = upper.register_forward_pre_hook(fail)
        try:
            stepper.step(sync_gradients=True)
            finish()
            endings.append("fine")
        except RuntimeError as error:
            endings.append(f"{type(error).__name__}: {error}")
        if hook is not None:
            hook.remove()
    return endings


class Slow(nn.Linear):
    """A stage whose forward is issued at once and keeps the device busy for 3 ms."""

    def __init__(self, place: Place) -> None:
        super().__init__(4, 4)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        """Sleeps on the device."""
        self.place.sleep(0.003)
        y: Tensor = super().forward(x)
        return y


def timed_step(
    rank: int, num_ranks: int, transport: str, place: Place
) -> tuple[StepStatistics, list[TraceEvent]]:
    """What the second of two steps of slow stages took, by the device's clock."""
    stages = [Slow(place).to(DEVICE) for _ in "01"]
    pipeline = DualPipe(stages, config=DualPipeConfig(**over(transport)))
    pipeline.times_device = True
    x = torch.ones(8, 4, device=DEVICE) if rank in (0, num_ranks - 1) else None
    labels = None if x is None else (x,)
    for _ in "01":
        pipeline.step(x, num_chunks=8, criterion=nn.functional.mse_loss, labels=labels)
    return pipeline.stats(), pipeline.last_trace


def reported_imbalance(rank: int, num_ranks: int, transport: str, place: Place) -> Imbalance:
    """Of eight layers, three of them in the first of four stages and one in the second.

    Four ranks, too many threads for messages over NCCL: it is the device's clock that counts.
    """
    transport = "copy" if transport == "nccl" else transport
    model = nn.Sequential(*(Slow(place) for _ in range(8))).to(DEVICE)
    partition = get_model_adapter(model).partition(num_ranks, [3, 1, 2, 2], show=False)
    pipeline = DualPipe([partition[rank]] * 2, config=DualPipeConfig(**over(transport)))
    x = torch.ones(8, 4, device=DEVICE) if rank in (0, num_ranks - 1) else None
    labels = None if x is None else (x,)

    def step() -> None:
        pipeline.step(x, num_chunks=8, criterion=nn.functional.mse_loss, labels=labels)

    step()
    if not ON_CPU:
        with pytest.raises(ValueError, match=r"pipeline.times_device = True"):
            report_imbalance(pipeline)
    pipeline.time_next_step()
    step()
    return report_imbalance(pipeline)


def main_grads(rank: int, num_ranks: int, job: Job) -> dict[int, dict[str, Tensor]]:
    """What a step leaves in the float32 `main_grad` of bf16 weights, by stage and name."""
    stepper = Stepper(rank, job)
    for parameter in stepper.pipeline.parameters():
        parameter.main_grad = torch.zeros_like(  # type: ignore[attr-defined]
            parameter, dtype=torch.float32
        )
    stepper.step()
    stepper.pipeline.sync_gradients()
    finish()
    modules = zip(stepper.pipeline.stages, stepper.pipeline.module, strict=True)
    return {
        stage: {
            name: p.main_grad.cpu()  # type: ignore[attr-defined]
            for name, p in module.named_parameters()
        }
        for stage, module in modules
    }


def copied(rank: int, num_ranks: int, transport: str, count: int) -> list[list[float]]:
    """What parameters of both stages have when they were made equal, one a bucket."""

    def stage(first: int) -> nn.Module:
        values = (torch.full((2,), float(first + i), device=DEVICE) for i in range(count))
        return nn.ParameterList(nn.Parameter(value) for value in values)

    config = DualPipeConfig(**over(transport), bucket_bytes=1)
    pipeline = DualPipe([stage(1000 * rank), stage(1000 * rank + 500)], config=config)
    return [[float(x[1]) for x in module.parameters()] for module in pipeline.module]


def check_more_buckets_than_a_channel_takes(
    transport: str, ranks: Literal["threads", "processes"]
) -> None:
    count = 300
    for rank, found in enumerate(
        run_ranks(copied, 2, ranks, (transport, count), timeout=TIME_LIMIT_S)
    ):
        of_own_number = (1000 * rank, 1000 * (1 - rank))
        assert found == [[first + i for i in range(count)] for first in of_own_number]
    for rank, found in enumerate(
        run_ranks(swapped, 2, ranks, (transport, count), timeout=TIME_LIMIT_S)
    ):
        first = 1000 * (1 - rank)
        assert found == [[first + more + i for i in range(count)] for more in (0.0, 500.0)]


def swapped(rank: int, num_ranks: int, transport: str, count: int) -> list[list[float]]:
    """What a mirror gives, one tensor a bucket; then again, the other way round."""
    config = DualPipeConfig(**over(transport), bucket_bytes=1)
    pipeline = DualPipe([nn.Linear(4, 4).to(DEVICE) for _ in "01"], config=config)
    found = []
    for first in (1000 * rank, 1000 * rank + 500):
        own = [torch.full((2,), float(first + i), device=DEVICE) for i in range(count)]
        given = pipeline.swap_with_mirror(own, [torch.zeros_like(x) for x in own])
        found.append([float(x[1]) for x in given])
    return found


def exact_weight_gradients(stages: list[nn.Module], job: Job) -> dict[int, dict[str, Tensor]]:
    """Sums of the products that the linear layers' weight gradients are, in float64.

    Their operands, inputs and output gradients, are those of the unsplit model in the job's type.
    """
    sums: dict[int, dict[str, Tensor]] = {s: {} for s in range(len(stages))}

    def watch(stage: int, name: str, layer: nn.Linear) -> None:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().double()

            def multiply(grad: Tensor) -> None:
                product = grad.double().T @ x
                sums[stage][name] = sums[stage].get(name, torch.zeros_like(product)) + product

            output.register_hook(multiply)

        layer.register_forward_hook(keep)

    for stage, module in enumerate(stages):
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear):
                watch(stage, f"{name}.weight", layer)
    for microbatch in job.microbatches():
        (x,), (target,) = microbatch
        for module in stages:
            x = module(x)
        job.what().criterion(x, target).backward()
    return {s: {name: value.cpu() for name, value in named.items()} for s, named in sums.items()}


def run_jobs(rank: int, num_ranks: int, jobs: list[Job]) -> list[RankResult]:
    """Several jobs, one after the other."""
    for job in jobs:
        warm_up(job)
    return [run_rank(rank, num_ranks, job) for job in jobs]


def _meet_again(rank: int, num_ranks: int, folder: str, backend: str) -> None:
    dist.destroy_process_group()
    dist.init_process_group(
        backend, init_method=f"file://{folder}/ranks", rank=rank, world_size=num_ranks
    )


def over_nccl_alone(
    rank: int, num_ranks: int, job: Job, folder: str, have_own_gpus: bool
) -> tuple[RankResult, str, list[str]]:
    """The job over torch's own group of NCCL; what its messages travelled over, and warnings.

    Args:
        rank: of this process.
        num_ranks: how many there are.
        job: what to run.
        folder: for the ranks to meet.
        have_own_gpus: whether ranks say that each has another GPU.
    """
    warm_up(job)
    _meet_again(rank, num_ranks, folder, "gloo" if ON_CPU else "nccl")
    own = patch.object(_transport, "_name_of_gpu", lambda device: f"GPU {rank}")
    with own if have_own_gpus else nullcontext(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run_rank(rank, num_ranks, job)
        again = DualPipe(own_stages(job, rank), config=DualPipeConfig(mirror_init="none"))
    return result, again.transport, sorted({str(warning.message) for warning in caught})


def _whole_model() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """On the device, with its batch: the same numbers every time."""
    with _random, torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(8)))
        x = torch.randn(16, 16)
    return model.to(DEVICE), (x.to(DEVICE), x.sin().to(DEVICE))


def trained(rank: int, num_ranks: int, transport: str, **groups: Any) -> list[float]:
    """The losses of four steps of a whole model; over replicas, each has its part of the rows."""
    model, batch = _whole_model()
    replicas = groups.get("replica_group")
    size, index = (1, 0) if replicas is None else (replicas.size(), replicas.rank())
    own = tuple(tensor.chunk(size)[index] for tensor in batch)
    wrapper = TrainingWrapper(
        model,
        setup_dual_pipe(model, num_ranks // size, **over(transport)),
        torch.optim.SGD,
        optimizer_options={"lr": 0.5},
        loss_fn=nn.functional.mse_loss,
        max_grad_norm=0.1,
        **groups,
    )
    assert wrapper.pipeline.transport == transport
    return [float(wrapper.train_step(own)) for _ in range(4)]


def trained_side_by_side(rank: int, num_ranks: int, transport: str, folder: str) -> list[float]:
    """The same over two pipelines, whose ranks meet over groups of NCCL alone, if over NCCL at all."""
    _meet_again(rank, num_ranks, folder, "nccl" if transport == "nccl" else "gloo")
    size = num_ranks // 2
    pipelines = [dist.new_group(range(first, first + size)) for first in (0, size)]
    replicas = [dist.new_group([place, place + size]) for place in range(size)]
    return trained(
        rank,
        num_ranks,
        transport,
        process_group=pipelines[rank // size],
        replica_group=replicas[rank % size],
    )


def trained_in_one_piece() -> list[float]:
    """The same without a pipeline."""
    model, (x, target) = _whole_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def die_on_the_device(rank: int, num_ranks: int, transport: str, folder: str) -> None:
    """Rank 1 kills its process in a step; the others write how the step went, and when."""
    kind = Dying if rank == 1 else nn.Linear
    stages = [kind(4, 4).to(DEVICE) for _ in "01"]
    pipeline = DualPipe(stages, config=DualPipeConfig(**over(transport) | {"timeout": 5.0}))
    x = torch.ones(8, 4, device=DEVICE) if rank in (0, num_ranks - 1) else None
    labels = None if x is None else (x,)

    def steps() -> None:
        for _ in range(3):
            pipeline.step(x, num_chunks=8, criterion=nn.functional.mse_loss, labels=labels)
            finish()

    outcome = attempt(steps)
    found = [outcome.error, outcome.text, outcome.seconds, time.time()]
    torch.save(found, Path(folder, str(rank)))
