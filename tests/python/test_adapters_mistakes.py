"""What adapters refuse to cut, how they say so, and what looks like it and is fine."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from adapted import check_chained, check_union, seeded
from plain_models import (
    GPT,
    WIDTH,
    Deciding,
    MaskedEncoder,
    ModeDependent,
    Remembering,
    Shared,
    Skipping,
    Surrounded,
    Wasteful,
    WithOptions,
    WithoutHead,
    compiled,
    hooked,
    in_bfloat16,
    patched,
    patched_within,
    surrounded,
    with_noise,
    without_gradients,
)
from process_ranks import cut_wrapped
from torch import Tensor, fx, nn

from dualpipe_ext.adapters import TransformerLayerAdapter, get_model_adapter
from dualpipe_ext.adapters.first_call import FirstCall
from dualpipe_ext.testing import run_ranks


def as_module(value: Any) -> nn.Module:
    assert isinstance(value, nn.Module)
    return value


class NoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(2, 2)


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "odd": (
        lambda: get_model_adapter(GPT()).partition(3),
        "num_partitions=3, the number of stages: it must be even",
    ),
    "too many": (
        lambda: get_model_adapter(GPT()).partition(6),
        "num_partitions=6, but the GPT has 4 layers.*use at most 4",
    ),
    "too many sizes": (
        lambda: get_model_adapter(GPT()).partition(2, balance=[1, 2, 1]),
        r"\[1, 2, 1\] has 3 sizes for 2",
    ),
    "sizes of another model": (
        lambda: get_model_adapter(GPT()).partition(2, balance=[4, 4]),
        "adds up to 8; the model has 4",
    ),
    "a stage without work": (
        lambda: get_model_adapter(GPT()).partition(4, balance=[2, 0, 1, 1]),
        "every stage but the first and the last needs a layer",
    ),
    "unknown balance": (
        lambda: get_model_adapter(GPT()).partition(2, balance="speed"),  # type: ignore[arg-type]
        "balance='speed': choose",
    ),
    "unknown architecture": (
        lambda: get_model_adapter(NoBlocks()),
        "NoBlocks has no list of blocks.*register_adapter",
    ),
    "skip connection": (
        lambda: get_model_adapter(Skipping()).partition(2, balance=[2, 2]),
        r"across stages: what blocks.0 computes \(stage 0\) is used behind blocks.2 \(stage 1\)",
    ),
    "a skip over nearly everything": (
        lambda: get_model_adapter(Skipping(6, 0, 5)).partition(4),
        "num_partitions=4, but Skipping has a skip connection across blocks.1 to blocks.5.*at most 2",
    ),
    "values decide": (lambda: get_model_adapter(Deciding()).partition(2), "cannot be traced"),
    "gradients switched off": (
        lambda: get_model_adapter(Surrounded(without_gradients)).partition(2),
        "switches gradients or autocast outside of its layers.*submodule",
    ),
    "autocast": (
        lambda: get_model_adapter(Surrounded(in_bfloat16)).partition(2),
        "switches gradients or autocast outside of its layers.*submodule",
    ),
    "random numbers": (
        lambda: get_model_adapter(Surrounded(with_noise)).partition(2),
        "calls torch.randn outside of its layers",
    ),
    "hooks": (lambda: get_model_adapter(hooked()).partition(2), r"hooks .* on the model \(Surr"),
    "a forward of one object": (
        lambda: get_model_adapter(patched()).partition(2),
        r"forward of the model \(Surrounded\) was replaced on this one object.*`del",
    ),
    "a forward of a container": (
        lambda: get_model_adapter(patched_within()).partition(2),
        r"forward of body \(Body\) was replaced on this one object",
    ),
    "a compiled model": (
        lambda: get_model_adapter(compiled()).partition(2),
        r"the model \(Surrounded\) was compiled.*layer.compile\(\)",
    ),
    "what compiling returned": (
        lambda: get_model_adapter(as_module(torch.compile(surrounded()))).partition(2),
        r"what torch.compile\(\) returned: pass .* model._orig_mod",
    ),
    "a wrapper of torch's": (
        lambda: get_model_adapter(nn.DataParallel(surrounded())),
        r"the model \(DataParallel\) wraps .*: pass what is in it, model.module",
    ),
    "another forward in training": (
        lambda: get_model_adapter(ModeDependent()).partition(2),
        "ModeDependent does something else in training than in evaluation.*nn.Dropout",
    ),
    "an unused parameter": (
        lambda: get_model_adapter(Wasteful()).partition(2),
        r"no stage of the Wasteful would hold forgotten.bias, forgotten.weight",
    ),
    "a shared module": (
        lambda: get_model_adapter(Shared()).partition(2),
        "norm.bias, norm.weight of the Shared would be held by several stages",
    ),
    "a module shared by many": (
        lambda: get_model_adapter(Shared()).partition(4),
        r"held by several stages, \[0, 1, 2, 3\].*users on one stage$",
    ),
    "a head that is the embedding": (
        lambda: get_model_adapter(WithoutHead()).partition(4),
        r"embedding.weight of the .* stages, \[0, 3\].*head.weight = embedding.weight",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str) -> None:
    make, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_that_is_wrapped_for_data_parallelism() -> None:
    (outcome,) = run_ranks(cut_wrapped, 1, "processes")
    assert outcome.is_a("ValueError"), outcome
    assert "DistributedDataParallel" in outcome.text and "model.module" in outcome.text
    assert "mesh=" in outcome.text


def test_more_inputs_than_a_model_takes_are_told() -> None:
    x, mask = torch.ones(2, 3, WIDTH), torch.ones(2, 3)
    first = get_model_adapter(WithOptions()).partition(2)[0]
    remedy = re.escape("TransformerLayerAdapter(model, inputs=('x', 'ignored', 'mask'))")
    with pytest.raises(ValueError, match=f"4 inputs were given.*takes x, in this order.*{remedy}"):
        first(x, mask, mask, mask)
    first = get_model_adapter(MaskedEncoder()).partition(2)[0]
    with pytest.raises(ValueError, match=r"3 inputs were given.*takes text, padding, in .*order$"):
        first(x, mask, mask)


def test_what_a_forward_takes_by_any_name_is_not_proposed() -> None:
    class Open(nn.Module):
        def forward(
            self, x: Tensor, *more: Tensor, mask: Tensor | None = None, **any_: Any
        ) -> None:
            raise NotImplementedError

    assert FirstCall.of(Open(), fx.Graph()).optional == ("x", "mask")


@pytest.mark.parametrize("asks_for_tensor", [False, True])
def test_inputs_that_a_trace_ignores_are_told(asks_for_tensor: bool) -> None:
    model = seeded(lambda: WithOptions(asks_for_tensor))
    names = ("x", "ignored", "mask")
    partitions = TransformerLayerAdapter(model, inputs=names).partition(2)
    x, mask = torch.ones(2, 3, WIDTH), torch.tensor([[1.0, 0.0, 1.0]] * 2)
    with pytest.raises(ValueError, match="ignored was given, and the forward of WithOptions did n"):
        partitions[0](x, mask, None)
    if asks_for_tensor:
        with pytest.raises(ValueError, match=r"place of isinstance\(mask, Tensor\) ask `mask is"):
            partitions[0](x, None, mask)
    inputs = (x, None, None if asks_for_tensor else mask)
    with torch.no_grad():
        check_chained(partitions, inputs, (model(*inputs),))


def test_what_is_no_model_is_told() -> None:
    with pytest.raises(TypeError, match="found function"):
        get_model_adapter(seeded)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"num_partitions=2\.0"):
        get_model_adapter(GPT()).partition(2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["steps", "notes", "hidden"])
def test_a_model_that_assigns_is_refused_and_left_as_it_was(what: str) -> None:
    model = seeded(lambda: Remembering(what))
    with pytest.raises(ValueError, match=f"it assigns {what}, which stages would not do"):
        get_model_adapter(model).partition(2, show=False)
    assert model.hidden is None and model.notes == [] and float(model.state_dict()["steps"]) == 0.0
    copy.deepcopy(model)


@pytest.mark.parametrize("check", range(5))
def test_checks_count_as_passed(check: int) -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            match check:
                case 0:
                    assert not (x.sum() > 100)
                case 1:
                    if not x.isfinite().all():
                        raise ValueError("not a number")
                case 2:
                    if not (x.sum() < 100 and x.sum() > 0):
                        raise ValueError("too little or too much")
                case 4:
                    if not self.blocks and x.sum() > 100:
                        raise ValueError("too much")
                case 3:
                    if x.sum() > 100 or x.sum() < 0:
                        raise ValueError("too little or too much")
            y: Tensor = self.blocks[1](self.blocks[0](x))
            return y

    model = Checked()
    partitions = get_model_adapter(model).partition(2, show=False)
    x = torch.ones(2, 4)
    with torch.no_grad():
        check_chained(partitions, (x,), (model(x),))


def test_a_skip_within_a_stage_is_fine() -> None:
    model = seeded(Skipping)
    partitions = get_model_adapter(model).partition(2, balance=[4, 0])
    x = torch.ones(2, 3, 8)
    with torch.no_grad():
        check_chained(partitions, (x,), (model(x),))


@pytest.mark.parametrize("balance", ["parameters", "memory", "time"])
@pytest.mark.parametrize(
    ("num_blocks", "source", "target", "num_partitions"),
    [(4, 0, 2, 2), (4, 0, 2, 4), (6, 0, 2, 2), (6, 1, 5, 2), (6, 3, 5, 4), (6, 0, 5, 2)],
)
def test_blocks_that_a_skip_passes_by_stay_together(
    balance: Literal["parameters", "memory", "time"],
    num_blocks: int,
    source: int,
    target: int,
    num_partitions: int,
) -> None:
    model = seeded(lambda: Skipping(num_blocks, source, target))
    x = torch.ones(2, 3, 8)
    partitions = get_model_adapter(model).partition(
        num_partitions, balance, sample_inputs=(x,), show=False
    )
    check_union(model, partitions)
    with torch.no_grad():
        check_chained(partitions, (x,), (model(x),))
    passed_by = [f"blocks.{i}" for i in range(source + 1, target + 1)]
    assert any(set(passed_by) <= set(partition.plan.layers) for partition in partitions)
    if balance == "time":
        measured = partitions[0].plan.layer_seconds
        assert set(measured) == {f"blocks.{i}" for i in range(num_blocks)}
        assert len({measured[name] for name in passed_by}) == 1
