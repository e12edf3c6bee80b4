"""The same training step on a pipeline and on the whole model; what either of them computes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from models import CASES, Case, Microbatch
from torch import Tensor, nn

from dualpipe_ext import DualPipeConfig, Pipeline, StepStatistics, microbatch_seed
from dualpipe_ext.schedule import Schedule, plan
from dualpipe_ext.testing import run_ranks

Gradients = dict[str, Tensor | None]
Sync = Literal["after", "within"]


@dataclass(frozen=True)
class Job:
    """One step of one case. Travels to processes by its fields."""

    case: str
    schedule: str
    num_ranks: int
    num_chunks: int
    stages_per_rank: int = 0
    dtype: torch.dtype = torch.float32
    sync: Sync = "after"
    rows: tuple[int, ...] = ()  # of each micro-batch; empty: 2
    config: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def plan(self) -> Schedule:
        return plan(self.schedule, self.num_ranks, self.num_chunks, self.stages_per_rank)

    @property
    def device_type(self) -> str:
        return torch.device(self.device).type

    def what(self) -> Case:
        return CASES[self.case]

    def microbatches(self) -> list[Microbatch]:
        rows = list(self.rows) or [2] * self.num_chunks
        made = self.what().microbatches(rows, dtype=self.dtype)
        return [Microbatch(self._here(m.inputs), self._here(m.labels)) for m in made]

    def stages(self) -> list[nn.Module]:
        stages = self.what().stages(self.plan().num_stages, self.dtype)
        return list(nn.ModuleList(stages).to(self.device))

    def _here(self, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.to(self.device) for t in tensors)


@dataclass
class RankResult:
    """What one rank has after the step, on the CPU; gradients by stage and name."""

    loss: Tensor | None
    outputs: Any
    gradients: dict[int, Gradients]
    stats: StepStatistics
    trace: list[str]


@dataclass
class Unsplit:
    """What the whole model has after the step.

    ``magnitudes``: sums over micro-batches of the absolute values of their gradients; bf16 alone.
    """

    losses: list[Tensor]
    outputs: list[tuple[Tensor | None, ...]]
    gradients: dict[int, Gradients]
    magnitudes: dict[int, Gradients] = field(default_factory=dict)


def as_tuple(value: Any) -> tuple[Tensor | None, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def run_unsplit(
    stages: Sequence[nn.Module],
    microbatches: Sequence[Microbatch],
    case: Case,
    *,
    seed: int | None = None,
    step: int = 1,
    backward: bool = True,
    device_type: str = "cpu",
) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
    """Micro-batch by micro-batch, forward and backward; returns losses and outputs."""
    losses, outputs = [], []
    for index, microbatch in enumerate(microbatches):
        with case.context(device_type):
            values = microbatch.inputs
            for number, stage in enumerate(stages):
                if seed is not None:
                    torch.manual_seed(microbatch_seed(seed, step, number, index))
                values = as_tuple(stage(*values))
            loss = case.criterion(*values, *microbatch.labels)
        if backward:
            loss.backward()
        losses.append(loss.detach().cpu())
        outputs.append(tuple(None if v is None else v.detach().cpu() for v in values))
    return losses, outputs


def unsplit(job: Job) -> Unsplit:
    stages = job.stages()
    seed = job.config.get("seed")
    losses, outputs = run_unsplit(
        stages, job.microbatches(), job.what(), seed=seed, device_type=job.device_type
    )
    gradients = {s: gradients_of(m) for s, m in enumerate(stages)}
    return Unsplit(
        losses, outputs, gradients, magnitudes(job) if job.dtype == torch.bfloat16 else {}
    )


def magnitudes(job: Job) -> dict[int, Gradients]:
    """Sums over micro-batches of the absolute values of their gradients, by stage and name."""
    stages = job.stages()
    sums: dict[int, Gradients] = {s: {} for s in range(len(stages))}
    for microbatch in job.microbatches():
        nn.ModuleList(stages).zero_grad()
        run_unsplit(stages, [microbatch], job.what(), device_type=job.device_type)
        for s, module in enumerate(stages):
            for name, grad in gradients_of(module).items():
                if grad is not None:
                    before = sums[s].get(name)
                    size = grad.double().abs()
                    sums[s][name] = size if before is None else before + size
    return sums


def gradients_of(module: nn.Module) -> Gradients:
    """Every parameter's gradient by name, under all its names."""
    return {
        name: None if parameter.grad is None else parameter.grad.cpu().clone()
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def join(parts: Iterable[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """Micro-batches as one batch."""
    return tuple(
        None if column[0] is None else torch.cat([t for t in column if t is not None])
        for column in zip(*parts, strict=True)
    )


def own_stages(job: Job, rank: int) -> list[nn.Module]:
    """A rank's stages, with what they share still shared."""
    stages = job.stages()
    mine = nn.ModuleList(stages[s] for s in job.plan().stages_of(rank))
    return list(copy.deepcopy(mine))


def own_batch(
    schedule: Schedule, rank: int, microbatches: Sequence[Microbatch]
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...] | None]:
    """(inputs, labels) to give to step() on a rank."""
    entering = schedule.microbatches_at(0, rank)
    leaving = schedule.microbatches_at(schedule.num_stages - 1, rank)
    inputs = join(microbatches[m].inputs for m in entering) if entering else (None,)
    labels = join(microbatches[m].labels for m in leaving) if leaving else None
    return inputs, labels


def run_rank(rank: int, num_ranks: int, job: Job) -> RankResult:
    """One step of the job on one rank."""
    pipeline = Pipeline(own_stages(job, rank), job.schedule, config=DualPipeConfig(**job.config))
    assert pipeline.stages == job.plan().stages_of(rank)
    inputs, labels = own_batch(job.plan(), rank, job.microbatches())
    case = job.what()
    with case.context(job.device_type):
        loss, outputs = pipeline.step(
            *inputs,
            num_chunks=job.num_chunks,
            criterion=case.criterion,
            labels=labels,
            return_outputs=True,
            sync_gradients=job.sync == "within",
        )
    if job.sync == "after":
        pipeline.sync_gradients()
    if (
        job.device_type != "cpu"
    ):  # a copy to the host may keep back the calls of other ranks' threads
        pipeline.synchronize()
    return RankResult(
        None if loss is None else loss.cpu(),
        _on_cpu(outputs),
        {s: gradients_of(m) for s, m in zip(pipeline.stages, pipeline.module, strict=True)},
        pipeline.stats(),
        [event.action for event in pipeline.last_trace],
    )


def _on_cpu(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(None if t is None else t.cpu() for t in outputs)
    return None if outputs is None else outputs.cpu()


def run_job(job: Job, ranks: Literal["threads", "processes"] = "threads") -> list[RankResult]:
    results: list[RankResult] = run_ranks(run_rank, job.num_ranks, ranks, (job,))
    return results


def cosine_difference(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    square = float((x * x + y * y).sum())
    return 0.0 if square == 0 else 1 - 2 * float((x * y).sum()) / square


def check_gradients(
    found: Gradients,
    expected: Gradients,
    dtype: torch.dtype,
    where: str,
    rounding: Gradients | None = None,
) -> None:
    """Within 1e-13 cosine difference in float32, 1e-12 relative in float64, ``rounding`` in bf16."""
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        own = found[name]
        if value is None:
            assert own is None, f"{where}, {name}: a gradient where the whole model has none"
            continue
        assert own is not None, f"{where}, {name}: no gradient"
        assert own.dtype == value.dtype and own.shape == value.shape, f"{where}, {name}"
        if dtype == torch.float64:
            error = float((own - value).norm() / value.norm().clamp_min(1e-300))
            assert error <= 1e-12, f"{where}, {name}: {error:g}"
        elif own.dtype == torch.bfloat16:
            limit = (rounding or {})[name]
            assert limit is not None
            error = float((own.double() - value.double()).norm())
            assert error <= float(limit), f"{where}, {name}: {error:g} > {limit:g}"
        else:
            difference = cosine_difference(own, value)
            assert difference < 1e-13, f"{where}, {name}: {difference:g}"


def rounding_of(sums: Gradients, num_microbatches: int) -> Gradients:
    """How far two sums in bf16 of the same gradients of micro-batches may be apart, by norm.

    Losses and outputs have equal bits, so both sides add the same terms, but in another order and
    with another number of roundings (a deferred W adds within its product, copies add half by
    half). An addition rounds by at most 2**-8 of a partial sum, which is no larger than the sum of
    absolute values; errors of N + 1 of them add up like independent ones. A micro-batch that is
    missing or counted twice is an N-th of that sum, and beyond the limit.
    """
    share = 2 * 2**-8 * (num_microbatches + 1) ** 0.5
    return {name: None if x is None else share * x.norm() for name, x in sums.items()}


def check_results(job: Job, results: Sequence[RankResult], expected: Unsplit) -> None:
    """Losses and outputs bit-equal, gradients equal up to the order of additions."""
    schedule = job.plan()
    for rank, result in enumerate(results):
        leaving = schedule.microbatches_at(schedule.num_stages - 1, rank)
        if leaving:
            losses = torch.stack([expected.losses[m] for m in leaving])
            assert result.loss is not None
            assert torch.equal(result.loss, losses), f"rank {rank}: {result.loss} != {losses}"
            outputs = join(expected.outputs[m] for m in leaving)
            check_equal(as_tuple(result.outputs), outputs, f"outputs of rank {rank}")
        else:
            assert result.loss is None and result.outputs is None
        for stage, gradients in result.gradients.items():
            where = f"rank {rank}, stage {stage}"
            rounding = rounding_of(expected.magnitudes.get(stage, {}), job.num_chunks)
            check_gradients(gradients, expected.gradients[stage], job.dtype, where, rounding)


def check_jobs(jobs: Sequence[Job], results: Sequence[Sequence[RankResult]]) -> None:
    """The results of several jobs, by rank."""
    for job, found in zip(jobs, zip(*results, strict=True), strict=True):
        check_results(job, found, unsplit(job))


def check_equal(
    found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...], where: str
) -> None:
    assert len(found) == len(expected), where
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            assert a is b, where
        else:
            assert a.dtype == b.dtype and torch.equal(a, b), where


def check_job(job: Job, ranks: Literal["threads", "processes"] = "threads") -> list[RankResult]:
    expected = unsplit(job)
    results = run_job(job, ranks)
    check_results(job, results, expected)
    return results
