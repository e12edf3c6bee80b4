"""Models in stages that adapters cut: the same outputs, parameters and training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    seeded,
    text,
)
from models import Microbatch
from parity import as_tuple
from plain_models import (
    CLASSES,
    GPT,
    TIME,
    WIDTH,
    Deciding,
    MaskedEncoder,
    ResNet,
    VisionTransformer,
    WithConstants,
    surrounded,
)
from torch import Tensor, nn
from torch_models import LanguageModel, Translator

from dualpipe_ext.adapters import (
    ModelAdapterBase,
    Stage,
    TransformerLayerAdapter,
    VisionModelAdapter,
    get_model_adapter,
    register_adapter,
)
from dualpipe_ext.adapters.torch_stacks import is_causal_mask


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)
    )


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
    "torch's encoder": (LanguageModel, lambda rows: (text(rows),)),
    "torch's decoder": (Translator, lambda rows: (text(rows), text(rows), padding(rows))),
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


def next_token(*outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0].flatten(0, 1), outputs[-1].flatten())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "constants"])
def test_trains_as_in_one_piece(name: str) -> None:
    make, inputs = MODELS[name]
    of_text = name in ("gpt", "torch's encoder")
    labels = text(2) if of_text else torch.tensor([1, 2])
    microbatches = [Microbatch(inputs(2), (labels,))] * NUM_CHUNKS
    criterion = next_token if of_text else classify
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


class Stacked(nn.Module):
    """Blocks that are stacks of layers, in a list of either kind."""

    def __init__(self, blocks: nn.ModuleList | nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.head(x)
        return output


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_blocks_may_be_stacks_of_layers(kind: Callable[[list[nn.Module]], Any]) -> None:
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
    model = Stacked(kind(list(blocks)))
    adapter = get_model_adapter(model)
    assert list(adapter.layers) == [f"blocks.{i}" for i in range(4)]
    x = torch.randn(3, WIDTH)
    check_chained(adapter.partition(2), (x,), (model(x),))


def test_lists_of_equal_layers_are_no_blocks_themselves() -> None:
    stages = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(2))) for _ in range(2)]
    adapter = get_model_adapter(Stacked(nn.ModuleList(stages)))
    assert list(adapter.layers) == ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"]


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


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_causal_masks_are_recognized(dtype: torch.dtype, batch_first: bool) -> None:
    hides = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    added = torch.zeros(TIME, TIME).masked_fill(hides, float("-inf"))
    mask = hides if dtype == torch.bool else added
    x = torch.zeros((2, TIME, WIDTH) if batch_first else (TIME, 2, WIDTH))
    assert is_causal_mask(mask, x, batch_first)
    assert is_causal_mask(mask, torch.zeros(TIME, WIDTH), batch_first)  # no batch
    assert not is_causal_mask(mask.T.contiguous(), x, batch_first)
    assert not is_causal_mask(mask[:-1, :-1], x, batch_first)
    assert not is_causal_mask(mask.expand(2, TIME, TIME), x, batch_first)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_torchs_transformer_may_have_the_sequence_first() -> None:
    model = seeded(lambda: nn.Transformer(WIDTH, 2, 1, 4, dim_feedforward=8, dropout=0.0))
    source, target = torch.randn(2, TIME, 3, WIDTH)
    with torch.no_grad():
        expected = outputs_of(model(source, target))
    check_chained(get_model_adapter(model).partition(2), (source, target), expected)


class ConstantMask(nn.Module):
    """An encoder whose mask is made once, and is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 8, dropout=0.0, norm_first=True, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(TIME)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x, self.mask)
        return y


def test_a_mask_may_be_a_constant() -> None:
    model = seeded(ConstantMask)
    x = torch.randn(2, TIME, WIDTH)
    with torch.no_grad():
        expected = outputs_of(model(x))
    check_chained(get_model_adapter(model).partition(2), (x,), expected)


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
