"""Partitions given to pipelines, on ranks that are threads."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapted import seeded, text
from plain_models import GPT, TIME, WIDTH
from torch import Tensor, nn

from dualpipe_ext import (
    DualPipe,
    DualPipeV,
    Pipeline,
    PipelineError,
    set_p2p_tensor_dtype,
    set_p2p_tensor_shapes,
)
from dualpipe_ext.adapters import empty_parameters, get_model_adapter
from dualpipe_ext.testing import run_ranks


def on_ranks(
    make_modules: Callable[[int, int], list[nn.Module]], schedule: str, num_ranks: int = 2
) -> str:
    """The errors that the ranks get, every one of them."""

    def build(rank: int, size: int) -> str:
        try:
            Pipeline(make_modules(rank, size), schedule)
        except (ValueError, PipelineError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    errors = run_ranks(build, num_ranks)
    assert all(errors)
    return "\n".join(errors)


def gpt_partitions(num_partitions: int) -> list[Any]:
    return list(get_model_adapter(seeded(GPT)).partition(num_partitions, show=False))


def test_an_error_in_a_cut_model_names_its_layer() -> None:
    def train(rank: int, size: int) -> str:
        partitions = gpt_partitions(size)
        partitions[1].get_submodule("blocks.3").double()
        pipeline = DualPipe([partitions[stage] for stage in (rank, 1 - rank)])
        try:
            pipeline.step(text(4), num_chunks=4, criterion=lambda y, _: y.sum(), labels=())
        except PipelineError as error:
            return str(error)
        return ""

    for found in run_ranks(train, 2):
        assert "dtype" in found, found
        assert re.search(r"\n  in blocks\.3\.\w[\w.]* \(\w+\)\n", found), found


def test_any_other_module_twice_is_an_error() -> None:
    linear = nn.Linear(2, 2)
    text = on_ranks(lambda rank, size: [linear, linear], "dualpipe")
    assert "ValueError: the same module was given twice; rank 0 needs two different ones" in text
    assert "[1, 0]" in text and "a partition" in text


def test_partitions_of_another_stage_are_told() -> None:
    text = on_ranks(lambda rank, size: [gpt_partitions(2)[i] for i in (1 - rank, rank)], "dualpipe")
    assert "partition 1 was given for stage 0" in text
    assert "pass [partitions[0], partitions[1]]" in text


def test_partitions_of_another_number_are_told() -> None:
    text = on_ranks(lambda rank, size: [gpt_partitions(4)[rank]] * 2, "dualpipe")
    assert "a partition of 4 was given to a pipeline of 2 stages" in text


def test_partitions_without_values_are_told() -> None:
    with torch.device("meta"):
        model = GPT()
    partitions = get_model_adapter(model).partition(2, show=False)
    text = on_ranks(lambda rank, size: [partitions[rank]] * 2, "dualpipe")
    assert "partition 0 has position on the meta device" in text
    assert "to_empty(device=...)" in text


def test_ranks_that_cut_otherwise_are_told() -> None:
    def modules(rank: int, size: int) -> list[nn.Module]:
        balance = [1, 1, 1, 1] if rank in (0, size - 1) else [0, 2, 1, 1]
        adapter = get_model_adapter(seeded(GPT))
        return [adapter.partition(size, balance, show=False)[rank]] * 2

    text = on_ranks(modules, "dualpipe", 4)
    assert "ranks differ in layers of stages: [1, 1, 1, 1] on rank 0, [0, 2, 1, 1] on" in text


def test_ties_across_ranks_are_told() -> None:
    text = on_ranks(lambda rank, size: [gpt_partitions(2)[rank]], "1f1b")
    assert "token.weight and head.weight are one parameter of stages [0, 1]" in text
    assert "use DualPipe" in text


def test_the_usage_that_was_asked_for() -> None:
    """The lines of the proposal that this project began with, but for the device."""

    def your_loss_fn(logits: Tensor, _: None, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    whole = seeded(GPT)

    def run(local_rank: int, size: int) -> tuple[Tensor | None, Any]:
        model = copy.deepcopy(whole)
        is_end = local_rank in (0, size - 1)
        inputs = text(8).flip(0 if local_rank else 1) if is_end else None
        labels = text(8).flip(1 if local_rank else 0) if is_end else None

        adapter = get_model_adapter(model)
        partitions = adapter.partition(num_partitions=4)
        set_p2p_tensor_shapes([(2, TIME, WIDTH)])
        set_p2p_tensor_dtype(torch.float32)
        local_module = partitions[local_rank].cpu()
        dualpipe_model = DualPipe([local_module, local_module])
        loss, outputs = dualpipe_model.step(
            inputs, num_chunks=8, criterion=your_loss_fn, labels=(labels,), return_outputs=True
        )
        return loss, outputs

    results = run_ranks(run, 4)
    for rank, entered in ((3, text(8).flip(1)), (0, text(8).flip(0))):  # what entered at the other
        loss, outputs = results[rank]
        logits, _ = whole(entered)
        torch.testing.assert_close(outputs[0], logits.detach())
        assert loss.shape == (4,)
    assert all(results[rank] == (None, None) for rank in (1, 2))


def test_the_legs_of_a_v_are_partitions_as_well() -> None:
    whole = seeded(GPT)

    def run(rank: int, size: int) -> Any:
        partitions = get_model_adapter(copy.deepcopy(whole)).partition(2 * size, show=False)
        pipeline = DualPipeV([partitions[2 * size - 1 - rank]] * 2)
        assert [p.plan.index for p in pipeline.module] == [rank, 2 * size - 1 - rank]
        with torch.no_grad():
            x = text(8) if rank == 0 else None
            return pipeline.step(x, num_chunks=4, return_outputs=True)[1]

    outputs, _ = run_ranks(run, 2)
    torch.testing.assert_close(outputs[0], whole(text(8))[0].detach())


def test_the_rest_of_a_model_is_freed() -> None:
    model = seeded(GPT)
    block = weakref.ref(model.get_submodule("blocks.1"))
    partition = get_model_adapter(model).partition(4, show=False)[0]
    del model
    gc.collect()
    assert block() is None
    assert partition.mirror().plan.index == 3


def test_what_is_done_to_a_partition_is_done_to_its_mirror() -> None:
    def build(rank: int, size: int) -> list[torch.dtype]:
        partition = gpt_partitions(size)[rank].double().eval()
        pipeline = DualPipe([partition, partition])
        assert not any(m.training for stage in pipeline.module for m in stage.modules())
        first, last = pipeline.module if rank == 0 else reversed(pipeline.module)
        assert first.get_parameter("token.weight") is last.get_parameter("head.weight")
        return [parameter.dtype for parameter in pipeline.parameters()]

    for dtypes in run_ranks(build, 2):
        assert set(dtypes) == {torch.float64}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_each_rank_gives_values_to_the_stage_of_its_own_number(num_ranks: int) -> None:
    """As docs/your_model.md has it for models larger than the memory."""
    whole = seeded(GPT)
    weights = whole.state_dict()
    with empty_parameters():  # for all threads of the process
        models = [GPT() for _ in range(num_ranks)]

    def run(rank: int, size: int) -> Any:
        partition = get_model_adapter(models[rank]).partition(size, show=False)[rank]
        partition.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in partition.parameters():
                parameter.fill_(float("nan"))
        partition.load_state_dict({name: weights[name] for name in partition.plan.names})
        pipeline = DualPipe([partition, partition])
        x = text(2 * size) if rank in (0, size - 1) else None
        with torch.no_grad():
            _, outputs = pipeline.step(x, num_chunks=2 * size, return_outputs=True)
        return outputs if outputs is None else outputs[0]

    expected = whole(text(2 * num_ranks))[0].detach()
    first, *_, last = run_ranks(run, num_ranks)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(last, expected)


def test_ties_hold_when_a_partition_is_materialized() -> None:
    with torch.device("meta"):
        partitions = get_model_adapter(GPT()).partition(2)
    first = partitions[0].to_empty(device="cpu")
    last = first.mirror()
    assert last is partitions[1]
    assert first.get_parameter("token.weight") is last.get_parameter("head.weight")
    assert first.get_parameter("token.weight").device.type == "cpu"
