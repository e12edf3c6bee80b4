"""The two copies of a stage: equal at the start, summed gradients, equal after training."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import WIDTH, Microbatch, squared_error
from parity import Job, gradients_of, own_batch, own_stages, run_job, run_unsplit
from torch import Tensor, nn

from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline
from dualpipe_ext.testing import run_ranks

State = dict[str, Tensor]
LEARNING_RATE, NUM_STEPS = 1e-2, 50


def optimizer_for(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=0.1)


def batch_of_step(job: Job, step: int) -> list[Microbatch]:
    return job.what().microbatches([2] * job.num_chunks, seed=step, dtype=job.dtype)


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> State:
    return {
        f"{name} {key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def train_rank(rank: int, num_ranks: int, job: Job, within: bool) -> dict[str, Any]:
    pipeline = Pipeline(own_stages(job, rank), job.schedule)
    optimizer = optimizer_for(pipeline)
    case, schedule, norms = job.what(), job.plan(), []
    for step in range(NUM_STEPS):
        inputs, labels = own_batch(schedule, rank, batch_of_step(job, step))
        optimizer.zero_grad()
        pipeline.step(
            *inputs,
            num_chunks=job.num_chunks,
            criterion=case.criterion,
            labels=labels,
            sync_gradients=within,
        )
        if not within:
            pipeline.sync_gradients()
        norms.append(float(pipeline.clip_grad_norm_(0.5)))
        optimizer.step()
    return {
        "norms": norms,
        "state": [dict(m.state_dict()) for m in pipeline.module],
        "optimizer": [optimizer_state(optimizer, m) for m in pipeline.module],
    }


def train_unsplit(job: Job) -> tuple[list[float], list[State]]:
    stages = nn.ModuleList(job.stages())
    optimizer = optimizer_for(stages)
    norms = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        run_unsplit(list(stages), batch_of_step(job, step), job.what())
        norms.append(float(nn.utils.clip_grad_norm_(stages.parameters(), 0.5)))
        optimizer.step()
    return norms, [dict(stage.state_dict()) for stage in stages]


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_chunks", "within"),
    [("tied", 2, 4, False), ("tied", 4, 8, True), ("attention", 4, 10, False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_fifty_optimizer_steps(
    name: str, num_ranks: int, num_chunks: int, within: bool, dtype: torch.dtype
) -> None:
    job = Job(name, "dualpipe", num_ranks, num_chunks, dtype=dtype)
    results = run_ranks(train_rank, num_ranks, args=(job, within))
    for rank in range(num_ranks // 2):
        mirror = results[num_ranks - 1 - rank]
        for kind in ("state", "optimizer"):
            lower, upper = results[rank][kind]
            mirrored_upper, mirrored_lower = mirror[kind]
            assert_same(lower, mirrored_lower)
            assert_same(upper, mirrored_upper)
    if dtype == torch.float32:
        return  # Adam turns the noise of gradients that are zero by symmetry into whole steps
    norms, states = train_unsplit(job)
    tolerance = 1e-9
    torch.testing.assert_close(results[0]["norms"], norms, rtol=tolerance, atol=0)
    for rank, result in enumerate(results):
        assert result["norms"] == results[0]["norms"]
        for stage, state in zip(job.plan().stages_of(rank), result["state"], strict=True):
            for key, value in state.items():
                expected = states[stage][key]
                error = float((value - expected).norm() / expected.norm())
                assert error < tolerance, f"stage {stage}, {key}: {error:g}"


@pytest.mark.parametrize("schedule", ["dualpipev", "1f1b"])
def test_training_without_mirrors(schedule: str) -> None:
    job = Job("attention", schedule, 2, 4, dtype=torch.float64)
    results = run_ranks(train_rank, 2, args=(job, False))
    norms, states = train_unsplit(job)
    torch.testing.assert_close(results[0]["norms"], norms, rtol=1e-9, atol=0)
    for rank, result in enumerate(results):
        for stage, state in zip(job.plan().stages_of(rank), result["state"], strict=True):
            for key, value in state.items():
                torch.testing.assert_close(value, states[stage][key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "num_ranks"), [("tied", 2), ("tied", 4), ("odd", 8)])
def test_a_sum_within_the_step_has_the_bits_of_one_after_it(name: str, num_ranks: int) -> None:
    after = run_job(Job(name, "dualpipe", num_ranks, 2 * num_ranks, sync="after"))
    within = run_job(Job(name, "dualpipe", num_ranks, 2 * num_ranks, sync="within"))
    for one, other in zip(after, within, strict=True):
        for stage, gradients in one.gradients.items():
            for key, value in gradients.items():
                compared = other.gradients[stage][key]
                assert (value is None) == (compared is None)
                assert value is None or (compared is not None and torch.equal(value, compared))


def clip_rank(rank: int, num_ranks: int, job: Job, norm_type: float) -> tuple[float, State]:
    pipeline = Pipeline(own_stages(job, rank), job.schedule)
    inputs, labels = own_batch(job.plan(), rank, job.microbatches())
    case = job.what()
    pipeline.step(
        *inputs,
        num_chunks=job.num_chunks,
        criterion=case.criterion,
        labels=labels,
        sync_gradients=True,
    )
    norm = pipeline.clip_grad_norm_(0.05, norm_type)
    assert norm.shape == ()
    stages = zip(pipeline.stages, pipeline.module, strict=True)
    return float(norm), {
        f"{stage} {name}": grad
        for stage, module in stages
        for name, grad in gradients_of(module).items()
        if grad is not None
    }


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize(
    ("name", "schedule", "num_ranks"),
    [
        ("tied", "dualpipe", 2),
        ("tied", "dualpipe", 4),
        ("tied", "dualpipev", 2),
        ("odd", "1f1b", 4),
    ],
)
def test_clipping_by_the_norm_of_the_unsplit_model(
    name: str, schedule: str, num_ranks: int, norm_type: float
) -> None:
    job = Job(name, schedule, num_ranks, 8, dtype=torch.float64)
    stages = nn.ModuleList(job.stages())
    run_unsplit(list(stages), job.microbatches(), job.what())
    expected = float(nn.utils.clip_grad_norm_(stages.parameters(), 0.05, norm_type))
    assert expected > 0.05  # or nothing is clipped
    for norm, gradients in run_ranks(clip_rank, num_ranks, args=(job, norm_type)):
        assert norm == pytest.approx(expected, rel=1e-12)
        for key, grad in gradients.items():
            stage, name = key.split(" ")
            whole = gradients_of(stages[int(stage)])[name]
            torch.testing.assert_close(grad, whole, rtol=1e-11, atol=1e-15)


def test_a_small_norm_changes_nothing() -> None:
    def rank_fn(rank: int, num_ranks: int) -> bool:
        pipeline = DualPipe([nn.Linear(2, 2), nn.Linear(2, 2)])
        for parameter in pipeline.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        pipeline.clip_grad_norm_(1.0)
        return all(
            bool((p.grad == 1e-3).all()) for p in pipeline.parameters() if p.grad is not None
        )

    assert run_ranks(rank_fn, 2) == [True, True]


class Counting(nn.Module):
    """A stage with buffers that differ between copies."""

    count: Tensor
    scratch: Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), float(value)))
        self.register_buffer("count", torch.full((3,), int(value)))
        self.register_buffer("scratch", torch.full((2,), float(value)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_broadcast_makes_copies_equal(num_ranks: int) -> None:
    def rank_fn(rank: int, num_ranks: int) -> list[list[float]]:
        stages = [Counting(10 * rank + 1), Counting(10 * rank + 2)]
        pipeline = DualPipe(stages)
        state = [[m.weight[0].item(), m.count[0].item(), m.scratch[0].item()] for m in stages]
        with torch.no_grad():
            stages[0].weight.fill_(100 + 10 * rank + 1)
            stages[1].weight.fill_(100 + 10 * rank + 2)
        pipeline.sync_parameters()
        return [*state, [stages[0].weight[0].item()], [stages[1].weight[0].item()]]

    for rank, (first, second, first_again, second_again) in enumerate(
        run_ranks(rank_fn, num_ranks)
    ):
        mirror = num_ranks - 1 - rank
        first_value = 10 * rank + 1  # of the rank with the stage's own number
        second_value = 10 * mirror + 1
        assert first == [first_value] * 3
        assert second == [second_value] * 3
        assert first_again == [100 + first_value] and second_again == [100 + second_value]


def test_check_finds_a_different_copy() -> None:
    def rank_fn(rank: int, num_ranks: int) -> str:
        torch_values = [1.0, 2.0] if rank == 0 else [2.0, 1.0 + 1e-6]
        with pytest.raises(ValueError, match="stage 0 differs between its copies on ranks 0 and 1"):
            DualPipe(
                [Counting(v) for v in torch_values], config=DualPipeConfig(mirror_init="check")
            )
        equal = [1.0, 2.0] if rank == 0 else [2.0, 1.0]
        DualPipe([Counting(v) for v in equal], config=DualPipeConfig(mirror_init="check"))
        return "raised"

    assert run_ranks(rank_fn, 2) == ["raised", "raised"]


def test_none_leaves_copies_as_they_are() -> None:
    def rank_fn(rank: int, num_ranks: int) -> float:
        stages = [Counting(rank), Counting(rank)]
        DualPipe(stages, config=DualPipeConfig(mirror_init="none"))
        return stages[0].weight[0].item()

    assert run_ranks(rank_fn, 2) == [0.0, 1.0]


def test_a_gradient_that_one_copy_lacks() -> None:
    def rank_fn(rank: int, num_ranks: int) -> list[Any]:
        stages = [nn.Linear(2, 2), nn.Linear(2, 2)]
        pipeline = DualPipe(stages)
        stage0 = stages[0] if rank == 0 else stages[1]
        if rank == 1:
            stage0.weight.grad = torch.full((2, 2), 3.0)
        pipeline.sync_gradients()
        return [stage0.weight.grad, stage0.bias.grad]

    for weight, bias in run_ranks(rank_fn, 2):
        assert torch.equal(weight, torch.full((2, 2), 3.0))
        assert bias is None


def test_accumulation_over_steps_then_one_sum() -> None:
    job = Job("tied", "dualpipe", 4, 8, dtype=torch.float64)

    def rank_fn(rank: int, num_ranks: int) -> list[dict[str, Tensor | None]]:
        pipeline = Pipeline(own_stages(job, rank), "dualpipe")
        for step in range(3):
            inputs, labels = own_batch(job.plan(), rank, batch_of_step(job, step))
            pipeline.step(*inputs, num_chunks=8, criterion=job.what().criterion, labels=labels)
        pipeline.sync_gradients()
        return [gradients_of(m) for m in pipeline.module]

    stages = job.stages()
    for step in range(3):
        run_unsplit(stages, batch_of_step(job, step), job.what())
    for rank, gradients in enumerate(run_ranks(rank_fn, 4)):
        for stage, own in zip(job.plan().stages_of(rank), gradients, strict=True):
            for name, expected in gradients_of(stages[stage]).items():
                torch.testing.assert_close(own[name], expected, rtol=1e-11, atol=1e-15)


class Normed(nn.Module):
    """A stage with a batch norm, and a mask that no sum may touch."""

    mask: Tensor

    def __init__(self, track: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=track)
        self.register_buffer("mask", torch.tensor([torch.finfo(torch.float32).min, -torch.inf]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x))
        return y


def test_running_statistics_get_the_mean_of_both_copies() -> None:
    """Each copy saw half of the batch; without the sum they differ."""

    def rank_fn(rank: int, num_ranks: int) -> list[list[dict[str, Tensor]]]:
        pipeline = DualPipe([Normed(track=True), Normed(track=True)])
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(rank))
        pipeline.step(x, num_chunks=4, criterion=squared_error, labels=(x,))
        found = []
        for _ in range(2):
            modules = sorted(zip(pipeline.stages, pipeline.module, strict=True))
            found.append([{n: b.clone() for n, b in m.named_buffers()} for _, m in modules])
            pipeline.sync_buffers()
        return found

    with pytest.warns(
        UserWarning, match=r"norm\.running_mean of stage 0 .* sync_buffers\(\)"
    ) as caught:
        (before, after), (other_before, other_after) = run_ranks(rank_fn, 2)
    assert [warning.filename for warning in caught] == [__file__]  # the user's own line
    for stage in range(2):
        for name in ("norm.running_mean", "norm.running_var"):
            a, b = before[stage][name], other_before[stage][name]
            assert not torch.equal(a, b)
            torch.testing.assert_close(after[stage][name], (a + b) / 2)
        for name, value in after[stage].items():
            assert torch.equal(value, other_after[stage][name])
        assert after[stage]["norm.num_batches_tracked"] == 2  # not 4
        assert torch.equal(after[stage]["mask"], before[stage]["mask"])


def test_batch_norms_that_the_first_rank_has_not_are_warned_of_by_it() -> None:
    def rank_fn(rank: int, num_ranks: int) -> None:
        kind = nn.BatchNorm1d if rank in (1, 2) else nn.LayerNorm
        DualPipe([kind(WIDTH), kind(WIDTH)])

    with pytest.warns(UserWarning, match=r"^running_mean of stage 1 .*") as caught:
        run_ranks(rank_fn, 4)
    assert len(caught) == 1


def test_batch_norms_that_cannot_drift_are_not_warned_of() -> None:
    def rank_fn(rank: int, num_ranks: int) -> None:
        DualPipe([Normed(track=False), Normed(track=False)])
        DualPipe([Normed(track=True).eval(), Normed(track=True).eval()])
        Pipeline([Normed(track=True)], "1f1b").sync_buffers()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_ranks(rank_fn, 2)
