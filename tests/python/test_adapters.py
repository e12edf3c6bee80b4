"""Models in stages that adapters cut: the same outputs, parameters and training; bad input."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from adapted import (
    NUM_CHUNKS,
    Training,
    chained,
    check_chained,
    check_training,
    check_union,
    outputs_of,
)
from models import Microbatch
from parity import as_tuple
from plain_models import (
    CLASSES,
    GPT,
    TIME,
    VOCABULARY,
    WIDTH,
    Deciding,
    MaskedEncoder,
    ModeDependent,
    Remembering,
    ResNet,
    Shared,
    Skipping,
    Surrounded,
    VisionTransformer,
    Wasteful,
    WithConstants,
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
from torch import Tensor, fx, nn

from dualpipe_ext import (
    DualPipe,
    DualPipeV,
    Pipeline,
    PipelineError,
    set_p2p_tensor_dtype,
    set_p2p_tensor_shapes,
)
from dualpipe_ext.adapters import (
    ModelAdapterBase,
    Stage,
    TransformerLayerAdapter,
    VisionModelAdapter,
    get_model_adapter,
    register_adapter,
)
from dualpipe_ext.adapters.first_call import FirstCall
from dualpipe_ext.testing import run_ranks


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return make()


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)
    )


def as_module(value: Any) -> nn.Module:
    assert isinstance(value, nn.Module)
    return value


def text(rows: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, TIME), generator=torch.Generator().manual_seed(rows))


def pictures(rows: int) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))


def padding(rows: int) -> Tensor:
    mask = torch.ones(rows, TIME)
    mask[0, -2:] = 0
    return mask


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "gpt": (GPT, lambda rows: (text(rows),)),
    "masks and tables": (MaskedEncoder, lambda rows: (text(rows), padding(rows))),
    "constants": (WithConstants, lambda rows: (text(rows),)),
    "resnet": (ResNet, lambda rows: (pictures(rows),)),
    "vision transformer": (VisionTransformer, lambda rows: (pictures(rows),)),
    "perceptron": (perceptron, lambda rows: (torch.ones(rows, 6),)),
}


@pytest.mark.parametrize("num_partitions", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_chained_partitions_are_the_model(name: str, num_partitions: int) -> None:
    make, inputs = MODELS[name]
    model = seeded(make)
    partitions = get_model_adapter(model).partition(num_partitions=num_partitions)
    check_union(model, partitions)
    assert not [name for name in vars(model) if name.startswith("_tensor_constant")]
    for rows in (2, 3):  # sizes are not frozen by tracing
        with torch.no_grad():
            expected = outputs_of(model(*inputs(rows)))
        check_chained(partitions, inputs(rows), expected)


def classify(*outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], outputs[-1])


def next_token(logits: Tensor, _: None, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "constants"])
def test_trains_as_in_one_piece(name: str) -> None:
    make, inputs = MODELS[name]
    labels = text(2) if name == "gpt" else torch.tensor([1, 2])
    microbatches = [Microbatch(inputs(2), (labels,))] * NUM_CHUNKS
    criterion = next_token if name == "gpt" else classify
    check_training(Training(seeded(make), microbatches, criterion))


def test_finds_the_adapter() -> None:
    assert type(get_model_adapter(GPT())) is TransformerLayerAdapter
    assert type(get_model_adapter(ResNet())) is VisionModelAdapter
    assert type(get_model_adapter(VisionTransformer())) is VisionModelAdapter


def test_a_plan_knows_its_layers_and_inputs() -> None:
    partitions = get_model_adapter(MaskedEncoder()).partition(2, balance=[3, 2])
    plan = partitions[1].plan
    assert (plan.architecture, plan.num_partitions, plan.index) == ("MaskedEncoder", 2, 1)
    assert plan.layers == ("body.layers.3", "body.layers.4")
    assert plan.inputs == ("text", "padding")
    assert plan.stages[0].layers == ("body.layers.0", "body.layers.1", "body.layers.2")
    assert "embedding.weight" in plan.stages[0].names
    assert "table" not in plan.stages[0].names  # the model does not save it


def test_the_ends_may_have_no_layers() -> None:
    model = seeded(GPT)
    partitions = get_model_adapter(model).partition(4, balance=[0, 2, 2, 0])
    check_union(model, partitions)
    assert partitions[0].plan.names == ("position", "token.weight")
    with torch.no_grad():
        check_chained(partitions, (text(2),), model(text(2)))


def test_evens_out_parameters() -> None:
    model = nn.Sequential(*(nn.Linear(width, 6) for width in (6, 6, 6, 6, 6, 6)), nn.Linear(6, 60))
    sizes = [len(p.plan.layers) for p in get_model_adapter(model).partition(2)]
    assert sizes == [6, 1]


def test_optional_inputs_can_be_taken() -> None:
    model = seeded(GPT)
    adapter = TransformerLayerAdapter(model, blocks="blocks", inputs=("text", "targets"))
    partitions = adapter.partition(4)
    with torch.no_grad():
        check_chained(partitions, (text(2), text(2)), model(text(2), text(2)))


def test_evaluation_mode_reaches_the_stages() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(4)))
    partitions = get_model_adapter(model).partition(2)
    for partition in partitions:
        partition.eval()
    x = torch.ones(2, 4)
    assert torch.equal(as_tuple(chained(partitions, (x,)))[0], model.eval()(x))  # type: ignore[arg-type]


def test_layers_may_have_calls_of_their_own() -> None:
    model = seeded(surrounded)
    patched, built, hooked = (model.get_submodule(f"blocks.{i}") for i in range(3))
    forward = patched.forward
    patched.__dict__["forward"] = lambda x: forward(x) * 2
    built.compile(backend="eager")
    hooked.register_forward_hook(lambda module, args, out: out * 3)
    x = torch.ones(2, 3, WIDTH)
    with torch.no_grad():
        check_chained(get_model_adapter(model).partition(4), (x,), (model(x),))


# What is registered by a user


class Opaque(Deciding):
    """What follows its forward cannot cut it."""


class OpaqueAdapter(ModelAdapterBase):
    @property
    def layers(self) -> list[str]:
        return [f"blocks.{i}" for i in range(4)]

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("x",)

    def cut(self, stages: Any) -> list[Stage]:
        def run(module: nn.Module, x: Tensor) -> Tensor:
            for block in module.get_submodule("blocks").children():
                x = block(x) if x.sum() > 0 else x
            return x

        def stage(own: range) -> nn.Module:
            module = nn.Module()
            blocks = {str(i): self.model.get_submodule(f"blocks.{i}") for i in own}
            module.blocks = nn.ModuleDict(blocks)
            return module

        return [Stage(stage(own), run) for own in stages]


def test_an_adapter_of_ones_own() -> None:
    model = seeded(Opaque)
    with pytest.raises(ValueError, match=r"Opaque cannot be traced.*register_adapter"):
        get_model_adapter(model).partition(2)
    register_adapter(Opaque)(OpaqueAdapter)
    partitions = get_model_adapter(model).partition(4)
    check_union(model, partitions)
    x = torch.ones(2, 3, 8)
    with torch.no_grad():
        check_chained(partitions, (x,), (model(x),))


# Bad input


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
        get_model_adapter(perceptron)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"num_partitions=2\.0"):
        get_model_adapter(GPT()).partition(2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["steps", "notes", "hidden"])
def test_a_model_that_assigns_is_refused_and_left_as_it_was(what: str) -> None:
    model = seeded(lambda: Remembering(what))
    with pytest.raises(ValueError, match=f"it assigns {what}, which stages would not do"):
        get_model_adapter(model).partition(2, show=False)
    assert model.hidden is None and model.notes == [] and float(model.state_dict()["steps"]) == 0.0
    copy.deepcopy(model)


@pytest.mark.parametrize("check", [0, 1])
def test_checks_count_as_passed(check: int) -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            if check:
                assert not (x.sum() > 100)
            if x.sum() > 100:
                raise ValueError("too much")
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


# Partitions on ranks


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


def test_ties_hold_when_a_partition_is_materialized() -> None:
    with torch.device("meta"):
        partitions = get_model_adapter(GPT()).partition(2)
    first = partitions[0].to_empty(device="cpu")
    last = first.mirror()
    assert last is partitions[1]
    assert first.get_parameter("token.weight") is last.get_parameter("head.weight")
    assert first.get_parameter("token.weight").device.type == "cpu"
