"""Even stages: the best split by what layers cost, and what is measured."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from busy_machine import holds_in_one_of
from hypothesis import given, settings
from hypothesis import strategies as st
from outcomes import Outcome, attempt
from plain_models import GPT
from slow_models import slow_model
from torch import Tensor, nn
from torch.optim import SGD

from dualpipe_ext import (
    DualPipe,
    DualPipeConfig,
    PipelineError,
    TrainingWrapper,
)
from dualpipe_ext.adapters import (
    Cost,
    Partition,
    PartitionPlan,
    TransformerLayerAdapter,
    get_model_adapter,
)
from dualpipe_ext.adapters.balance import balanced_sizes, step_seconds, sum_of
from dualpipe_ext.adapters.split import best_for_ranks, best_for_stages, fronts
from dualpipe_ext.schedule import CostModel, plan
from dualpipe_ext.testing import run_ranks


def all_splits(num_items: int, num_stages: int) -> Iterator[list[int]]:
    for cuts in itertools.combinations(range(1, num_items), num_stages - 1):
        yield [b - a for a, b in itertools.pairwise((0, *cuts, num_items))]


def worst(costs: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """(costliest rank, costliest stage) of a split."""
    edges = list(itertools.accumulate(sizes, initial=0))
    stages = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
    return max(a + b for a, b in zip(stages, stages[::-1], strict=True)), max(stages)


@given(st.lists(st.integers(0, 20), min_size=4, max_size=9), st.sampled_from([2, 4]))
@settings(deadline=None, max_examples=60)
def test_no_split_beats_the_best(costs: list[int], num_stages: int) -> None:
    possible = [worst(costs, sizes) for sizes in all_splits(len(costs), num_stages)]
    assert worst(costs, best_for_ranks(costs, num_stages)) == min(possible)
    found = list(fronts(costs, num_stages))
    for rank, stage, sizes in found:
        assert (rank, stage) == worst(costs, sizes)
    for rank, stage in possible:
        assert any(r <= rank and s <= stage for r, s, _ in found)


@given(st.lists(st.integers(0, 20), min_size=5, max_size=9), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_no_split_beats_the_best_of_stages_alone(costs: list[int], num_stages: int) -> None:
    possible = [worst(costs, sizes)[1] for sizes in all_splits(len(costs), num_stages)]
    sizes = best_for_stages(costs, num_stages)
    assert min(sizes) > 0 and sum(sizes) == len(costs)
    assert worst(costs, sizes)[1] == min(possible)


def test_of_steps_that_take_as_long_the_evenest_is_taken() -> None:
    """On two ranks all splits do: each rank has both stages."""
    costs = [Cost(), *[Cost(1.0, 1.001 + 1e-3 * i, 1.0) for i in range(8)], Cost()]
    assert balanced_sizes(costs, 2, "time") == [5, 5]


def test_stages_of_other_schedules_count_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(*(nn.Linear(width, width) for width in (8, 4, 4, 4, 8, 4)))
    adapter = get_model_adapter(model)
    partitions = adapter.partition(3, paired=False)
    assert [len(p.plan.layers) for p in partitions] == [1, 3, 2]
    assert "ranks" not in capsys.readouterr().out.replace("ranks' load", "")
    with pytest.raises(ValueError, match="must be even"):
        adapter.partition(3)


def test_a_layer_has_no_share_of_the_head_behind_it() -> None:
    blocks = [nn.Linear(8, 8, bias=False) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.LayerNorm(8), nn.Linear(8, 56, bias=False))
    adapter = TransformerLayerAdapter(WithHead(model[:4], model[5]), blocks="blocks")
    plan = adapter.partition(2, balance=[2, 2], show=False)[0].plan
    assert plan.share_of("blocks.1") == pytest.approx(1 / 2)
    assert plan.share_of("blocks.3") == pytest.approx(64 / (2 * 64 + 8 * 56))


class WithHead(nn.Module):
    """Blocks and what comes behind them."""

    def __init__(self, blocks: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks.children())
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def test_step_times_are_those_of_the_simulator() -> None:
    stages = [Cost(forward=2.0, backward_input=3.0, backward_weight=1.0)] * 4
    costs = CostModel(forward=2.0, backward_input=3.0, backward_weight=1.0)
    expected = plan("dualpipe", 4, 12).simulate(costs, sends="early").makespan
    assert step_seconds(stages, 12) == expected


def test_two_ranks_never_wait_whatever_their_stages_take() -> None:
    stages = [Cost(1.0, 3.0, 0.5), Cost(2.0, 5.0, 0.25)]
    assert step_seconds(stages, 4) == 2 * (1 + 3 + 0.5 + 2 + 5 + 0.25)


@pytest.mark.parametrize("seed", range(4))
def test_simulated_steps_are_near_the_best_of_all_splits(seed: int) -> None:
    """A large head, and every third block twice as wide."""
    draw = random.Random(seed)
    seconds = [0.1, *(draw.choice([1.0, 1.1]) * (2 if i % 3 == 2 else 1) for i in range(7))]
    costs = [Cost(s / 3, s / 3, s / 3) for s in [*seconds, draw.choice([2.0, 3.0, 5.0])]]

    def step(sizes: Sequence[int]) -> float:
        return step_seconds(sum_of(costs, sizes), 12)

    best = min(step(sizes) for sizes in all_splits(len(costs), 4))
    assert step(balanced_sizes(costs, 4, "time")) <= 1.05 * best


def measured_step(milliseconds: Sequence[float], sizes: Sequence[int]) -> float:
    """Seconds of the fastest of three steps on 4 ranks, of stages with so many layers."""

    def train(rank: int, size: int) -> float:
        adapter = get_model_adapter(slow_model(milliseconds))
        partition = adapter.partition(size, balance=sizes, show=False)[rank]
        pipeline = DualPipe([partition, partition])
        x = torch.ones(4, 2) if rank in (0, size - 1) else None
        seconds = []
        for _ in range(3):
            pipeline.step(x, num_chunks=8, criterion=Tensor.sum, labels=())
            seconds.append(pipeline.stats().step_seconds)
        return min(seconds)

    return float(max(run_ranks(train, 4)))


UNEVEN = (1, 1, 2, 1, 1, 2, 4)  # milliseconds of F, of I and of W


def balanced_by_time(milliseconds: Sequence[float]) -> PartitionPlan:
    adapter = get_model_adapter(slow_model(milliseconds))
    inputs = (torch.ones(1, 2),)
    return adapter.partition(4, "time", sample_inputs=inputs, show=False)[0].plan


@pytest.mark.measures
def test_measures_times() -> None:
    milliseconds = [4 * m for m in UNEVEN]  # a machine may wake up some 0.3 ms late

    def check() -> None:
        plan = balanced_by_time(milliseconds)
        measured = [1e3 * plan.layer_seconds[str(i)] / 3 for i in range(len(milliseconds))]
        assert measured == pytest.approx(milliseconds, rel=0.3)

    holds_in_one_of(5, check)


@pytest.mark.measures
def test_a_measured_step_is_near_the_best() -> None:
    milliseconds = UNEVEN
    own = tuple(len(stage.layers) for stage in balanced_by_time(milliseconds).stages)
    steps = {tuple(s): measured_step(milliseconds, s) for s in all_splits(7, 4)}
    for _ in range(6):  # as many more tries for both where a busy machine has slowed one of them
        best = min(steps, key=lambda split: steps[split])
        if steps[own] <= 1.05 * steps[best]:
            break
        for split in (own, best):
            steps[split] = min(steps[split], measured_step(milliseconds, split))
    assert steps[own] <= 1.05 * min(steps.values()), (own, steps)


def test_measures_activations() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))
    adapter = get_model_adapter(model)
    plan = adapter.partition(2, "memory", sample_inputs=(torch.ones(5, 6),), show=False)[0].plan
    # Each linear layer keeps its input, each Tanh its output.
    assert [stage.cost.activation_bytes for stage in plan.stages] == [2 * 2 * (5 * 6 * 4)] * 2
    assert [stage.cost.num_parameters for stage in plan.stages] == [84, 84]


def test_leaves_gradients_and_random_numbers_alone() -> None:
    model = GPT()
    state = torch.random.get_rng_state()
    text = torch.zeros(1, 6, dtype=torch.long)
    get_model_adapter(model).partition(2, "time", sample_inputs=(text,), show=False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_leaves_buffers_alone() -> None:
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(4)]
    model = nn.Sequential(*layers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    get_model_adapter(model).measure([torch.randn(8, 4)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_ranks_take_what_the_first_one_measured() -> None:
    def sizes(rank: int, size: int) -> tuple[object, ...]:
        model = slow_model([1, 1, 1, 1] if rank == 0 else [1, 1, 1, 20])
        adapter = get_model_adapter(model)
        inputs = (torch.ones(1, 2),)
        plan = adapter.partition(size, "time", sample_inputs=inputs, show=False)[0].plan
        return plan.stages, plan.layer_seconds

    first, second = run_ranks(sizes, 2)
    assert first == second


def test_a_first_rank_that_cannot_measure_tells_all() -> None:
    """It measures alone: others would slow it down."""

    def cut(rank: int, size: int) -> str:
        inputs = (torch.ones(1, 2),) if rank == 1 else None
        with pytest.raises((ValueError, PipelineError)) as caught:
            get_model_adapter(slow_model([1, 1])).partition(size, "time", sample_inputs=inputs)
        return str(caught.value)

    first, second = run_ranks(cut, 2)
    assert first.startswith("layers of a Sequential are measured with a micro-batch")
    assert second.startswith("rank 0 could not measure its layers: ValueError: layers of a Sequen")


def test_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    get_model_adapter(GPT()).partition(2)
    printed = capsys.readouterr().out
    assert "GPT in 2 stages" in printed
    assert "all before, blocks.0 to 1 (2)" in printed
    assert "blocks.2 to 3 (2), all behind" in printed


def test_asks_for_inputs_and_values() -> None:
    with pytest.raises(
        ValueError, match=r"measured with a micro-batch; pass sample_inputs=\(text,"
    ):
        get_model_adapter(GPT()).partition(2, "time")
    with torch.device("meta"):
        adapter = get_model_adapter(GPT())
    with pytest.raises(ValueError, match="meta device cannot be measured; use balance='param"):
        adapter.partition(2, "memory", sample_inputs=(torch.zeros(1, 6, dtype=torch.long),))


def test_a_configuration_says_how_to_cut() -> None:
    """By times, where it is told so: the first layer takes as long as all others."""

    def cut(rank: int, size: int, **options: Any) -> list[tuple[str, ...]]:
        model = slow_model([8, 1, 1, 1, 1, 1, 1, 1, 1])
        wrapper = TrainingWrapper(model, DualPipeConfig(balance="time"), SGD, **options)
        partition = wrapper.pipeline.module[0]
        assert isinstance(partition, Partition)
        return [stage.layers for stage in partition.plan.stages]

    with pytest.raises(ValueError, match="are measured with a micro-batch; pass sample_inputs="):
        run_ranks(cut, 4)
    first, *others = run_ranks(partial(cut, sample_inputs=(torch.ones(1, 2),)), 4)
    assert all(stages == first for stages in others)
    by_rank = [first[0] + first[3], first[1] + first[2]]
    assert min(by_rank, key=len) in [("0",), ("0", "1"), ("0", "8")], first


@pytest.mark.parametrize("what", ["an option", "the balance", "the schedule", "the measuring"])
def test_a_rank_that_is_cut_differently_is_told_to_all(what: str) -> None:
    def make(rank: int, size: int) -> list[Outcome]:
        sizes: Any = "parameters" if rank and what == "the balance" else "time"
        schedule = "1f1b" if rank and what == "the schedule" else "dualpipe"
        options: dict[str, Any] = {"sample_inputs": (torch.ones(1, 2),)}
        if rank and what == "an option":
            options["accumulation_steps"] = 0
        if rank == 0 and what == "the measuring":
            options["sample_inputs"] = (torch.ones(1, 2, 3, 4), torch.ones(1))
        found = []
        for config, more in (
            (DualPipeConfig(schedule=schedule, balance=sizes, timeout=20.0), options),
            (DualPipeConfig(timeout=20.0), {}),
        ):
            found.append(attempt(TrainingWrapper, slow_model([1, 1]), config, SGD, **more))
        return found

    for rank, (wrong, right) in enumerate(run_ranks(make, 2)):
        assert right.error == "" and wrong.seconds < 10
        if what in ("the balance", "the schedule"):
            assert wrong.error == "ValueError"
            assert f"ranks differ in {what.removeprefix('the ')}: " in wrong.text
        else:
            culprit = 1 if what == "an option" else 0
            assert (wrong.error == "PipelineError") == (rank != culprit), wrong
            part = "accumulation_steps=0" if culprit else "could not measure its layers"
            assert part in wrong.text or rank == culprit


def test_a_balance_for_what_is_cut_already_is_refused() -> None:
    def make(rank: int, size: int) -> None:
        partitions = get_model_adapter(slow_model([1, 1])).partition(size, [2, 0], show=False)
        TrainingWrapper(partitions, DualPipeConfig(balance=[2, 0]), SGD)
        TrainingWrapper(partitions, DualPipeConfig(balance=[1, 1]), SGD)

    with pytest.raises(ValueError, match=r"balance=\[1, 1\] says how to cut.*cut otherwise"):
        run_ranks(make, 2)
