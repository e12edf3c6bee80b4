"""Models that adapters have cut, beside the models in one piece."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from models import Microbatch
from parity import as_tuple, check_equal, own_batch
from plain_models import TIME, VOCABULARY
from torch import Tensor, nn

from dualpipe_ext import DualPipe
from dualpipe_ext.adapters import ModelAdapterBase, Partition, get_model_adapter
from dualpipe_ext.schedule import plan
from dualpipe_ext.testing import run_ranks

NUM_STEPS = 20
NUM_CHUNKS = 8

Tensors = tuple[Tensor | None, ...]
MakeAdapter = Callable[[nn.Module], ModelAdapterBase]


@dataclass(frozen=True)
class Training:
    """A model with the micro-batches of one step and its loss."""

    model: nn.Module
    microbatches: list[Microbatch]
    criterion: Callable[..., Tensor]  # of one micro-batch
    adapter: MakeAdapter = get_model_adapter

    def loss(self, *outputs_and_labels: Tensor) -> Tensor:
        return self.criterion(*outputs_and_labels) / NUM_CHUNKS


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    """AdamW that does not blow rounding up to whole steps where a gradient is zero but for it."""
    return torch.optim.AdamW(parameters, lr=5e-3, eps=1e-3)


def chained(partitions: Sequence[nn.Module], inputs: Tensors) -> Tensors:
    """The partitions one after the other."""
    values = inputs
    for partition in partitions:
        values = as_tuple(partition(*values))
    return values


def check_chained(partitions: Sequence[Partition], inputs: Tensors, expected: Tensors) -> None:
    """The chain gives the model's outputs, bit for bit; every stage gives tensors and None."""
    with torch.no_grad():
        check_equal(chained(partitions, inputs), expected, repr(partitions[0]))


def check_union(model: nn.Module, partitions: Sequence[Partition]) -> None:
    """Parameters and buffers are the model's own objects, each under its name and exactly once."""
    names = [name for partition in partitions for name in partition.state_dict()]
    assert sorted(names) == sorted(model.state_dict())
    objects = dict(model.named_parameters(remove_duplicate=False))
    for index, partition in enumerate(partitions):
        assert partition.plan.index == index
        assert partition.plan.names == tuple(partition.state_dict())
        for name, parameter in partition.named_parameters(remove_duplicate=False):
            assert objects.pop(name) is parameter
    assert not objects


def train_unsplit(job: Training) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(losses of each step by micro-batch, the state at the end)."""
    model = copy.deepcopy(job.model)
    optimizer = optimizer_of(model.parameters())
    inputs = job.adapter(model).inputs
    losses = []
    for _ in range(NUM_STEPS):
        step = []
        for microbatch in job.microbatches:
            given = dict(zip(inputs, microbatch.inputs, strict=False))
            outputs = outputs_of(model(**given))
            loss = job.loss(*outputs, *microbatch.labels)  # type: ignore[arg-type]
            loss.backward()
            step.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(step))
    return losses, model.state_dict()


def outputs_of(returned: Any) -> Tensors:
    """What a model returned, as tensors."""
    return returned.to_tuple() if hasattr(returned, "to_tuple") else as_tuple(returned)


def train_rank(rank: int, size: int, job: Training) -> tuple[list[Tensor], dict[str, Tensor]]:
    model = copy.deepcopy(job.model)
    partition = job.adapter(model).partition(num_partitions=size, show=False)[rank]
    pipeline = DualPipe([partition, partition])
    optimizer = optimizer_of(pipeline.parameters())
    inputs, labels = own_batch(plan("dualpipe", size, NUM_CHUNKS), rank, job.microbatches)
    losses = []
    for _ in range(NUM_STEPS):
        loss, _ = pipeline.step(
            *inputs, num_chunks=NUM_CHUNKS, criterion=job.loss, labels=labels, sync_gradients=True
        )
        optimizer.step()
        optimizer.zero_grad()
        if loss is not None:
            losses.append(loss)
    return losses, partition.state_dict()


def check_training(job: Training) -> None:
    """On 2 and on 4 ranks, losses within 1e-5 of those in one piece, parameters within 1e-4."""
    expected, state = train_unsplit(job)
    assert not torch.allclose(expected[0], expected[-1], rtol=1e-2), "nothing was learnt"
    for num_ranks in (2, 4):
        _check_split(job, num_ranks, expected, state)


def _check_split(
    job: Training, num_ranks: int, expected: list[Tensor], state: dict[str, Tensor]
) -> None:
    results = run_ranks(train_rank, num_ranks, args=(job,))
    # The first half of the micro-batches leaves at the last rank.
    for step, wanted in enumerate(expected):
        found = torch.cat([results[-1][0][step], results[0][0][step]])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0, msg=f"step {step}")
    found_state = {name: value for _, part in results for name, value in part.items()}
    assert found_state.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(found_state[name], value, rtol=1e-4, atol=1e-5, msg=name)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return make()


def text(rows: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, TIME), generator=torch.Generator().manual_seed(rows))
