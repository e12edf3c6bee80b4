"""Hugging Face models in stages: the same outputs, the same parameters, the same training."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from adapted import NUM_CHUNKS, Training, check_chained, check_training, check_union, outputs_of
from hf_models import ARCHITECTURES, OTHERS_LIKE_THEM, Architecture
from programs import run_here, torchrun_here
from torch import nn

from dualpipe_ext import DualPipe, PipelineError
from dualpipe_ext.adapters import empty_parameters, get_model_adapter
from dualpipe_ext.adapters.huggingface import FAMILIES, HuggingFaceAdapter
from dualpipe_ext.testing import run_ranks

ALL = {**ARCHITECTURES, **OTHERS_LIKE_THEM}


@pytest.mark.parametrize("attention", [None, "eager"], ids=["its own attention", "eager"])
@pytest.mark.parametrize("num_partitions", [2, 4])
@pytest.mark.parametrize("name", ALL)
def test_chained_partitions_are_the_model(
    name: str, num_partitions: int, attention: str | None
) -> None:
    architecture = ALL[name]
    model = architecture.make(attn_implementation=attention).eval()
    adapter = get_model_adapter(model)
    partitions = adapter.partition(num_partitions=num_partitions, show=False)
    check_union(model, partitions)
    inputs = architecture.inputs(rows=3)
    for others in ((), ("attention_mask",), ("attention_mask", "position_ids")):
        present = {k: v for k, v in inputs.items() if k in (adapter.inputs[0], *others)}
        with torch.no_grad():
            expected = outputs_of(model(**present))
        check_chained(partitions, tuple(present.get(n) for n in adapter.inputs), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trains_as_in_one_piece(name: str) -> None:
    check_training(training(ARCHITECTURES[name]))


def training(architecture: Architecture) -> Training:
    model = architecture.make()
    inputs = get_model_adapter(model).inputs
    microbatches = [architecture.microbatch(2, inputs, seed) for seed in range(NUM_CHUNKS)]
    return Training(model, microbatches, architecture.criterion)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_is_partitioned_without_values(name: str) -> None:
    architecture = ARCHITECTURES[name]
    expected = get_model_adapter(architecture.make()).partition(4, show=False)
    partitions = get_model_adapter(architecture.make("meta")).partition(4, show=False)
    assert [p.plan for p in partitions] == [p.plan for p in expected]
    assert all(x.is_meta for p in partitions for x in (*p.parameters(), *p.buffers()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_loaded_by_partition(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.make().eval()
    with empty_parameters():
        empty = architecture.make().eval()
    assert all(parameter.is_meta for parameter in empty.parameters())
    adapter = get_model_adapter(empty)
    partitions = adapter.partition(4, show=False)
    whole = model.state_dict()
    for partition in partitions:
        num_parameters = len(list(partition.parameters()))
        partition.to_empty(device="cpu")
        assert len(list(partition.parameters())) == num_parameters  # what was shared still is
        partition.load_state_dict({name: whole[name] for name in partition.plan.names})
    inputs = architecture.inputs(rows=3)
    with torch.no_grad():
        expected = outputs_of(model(**inputs))
    check_chained(partitions, tuple(inputs.get(n) for n in adapter.inputs), expected)


def test_buffers_without_values_are_told() -> None:
    partition = get_model_adapter(ARCHITECTURES["llama"].make("meta")).partition(2, show=False)[0]
    with pytest.raises(ValueError, match=r"rotary_emb.inv_freq.*empty_parameters"):
        partition.to_empty(device="cpu")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_layers_are_measured(name: str) -> None:
    adapter = get_model_adapter(ARCHITECTURES[name].make())
    plan = adapter.partition(2, balance="time", show=False)[0].plan
    assert sum(len(stage.layers) for stage in plan.stages) == 4
    assert all(stage.cost.forward > 0 and stage.cost.activation_bytes > 0 for stage in plan.stages)


@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.tied])
def test_tied_embeddings_are_one_parameter_of_a_rank(name: str) -> None:
    partitions = get_model_adapter(ARCHITECTURES[name].make()).partition(4, show=False)
    (tie,) = [t for t in partitions[0].plan.ties if len(t) == 2]
    (first, embedding), (last, head) = tie
    assert (first, last) == (0, 3)
    assert partitions[0].get_parameter(embedding) is partitions[3].get_parameter(head)


@pytest.mark.parametrize("setting", ["output_hidden_states", "output_attentions"])
def test_outputs_of_every_layer_are_refused(setting: str) -> None:
    settings: dict[str, Any] = {setting: True}
    model = ARCHITECTURES["llama"].make(attn_implementation="eager", **settings)
    with pytest.raises(ValueError, match=f"config.{setting} is set.*model.config.{setting} = Fals"):
        get_model_adapter(model)


def test_router_losses_are_refused() -> None:
    model = ARCHITECTURES["mixtral"].make(output_router_logits=True)
    with pytest.raises(ValueError, match="output_router_logits is set"):
        get_model_adapter(model)


def bind(module: Any) -> None:
    module.forward = MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k), module)


def compile_forward(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: None)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a method": (bind, "was replaced on this one object.*`del x.forward`"),
    "a compiled forward": (compile_forward, "was replaced on this one object"),
    "compiled": (lambda m: m.compile(backend="eager"), r"was compiled.*layer.compile\(\)"),
    "a hook": (hook, "hooks are registered on"),
    "accelerate": (
        lambda module: add_hook_to_module(module, ModelHook()),
        r"remove_hook_from_module\(model, recurse=True\)",
    ),
}


@pytest.mark.parametrize("place", ["", "model"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_would_run_the_whole_model_in_a_stage_is_refused(change: str, place: str) -> None:
    model = ARCHITECTURES["llama"].make()
    make, message = CHANGES[change]
    make(model.get_submodule(place))
    with pytest.raises(ValueError, match=message):
        get_model_adapter(model).partition(2, show=False)


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_may_be_called_as_one_likes(change: str) -> None:
    model = ARCHITECTURES["llama"].make().eval()
    for i in range(4):
        CHANGES[change][0](model.get_submodule(f"model.layers.{i}"))
    check_that_blocks_run_once(model)


def test_a_model_is_cut_without_the_hooks_of_accelerate() -> None:
    model = ARCHITECTURES["llama"].make().eval()
    for module in (model, *model.children()):
        add_hook_to_module(module, ModelHook())
    remove_hook_from_module(model, recurse=True)
    check_that_blocks_run_once(model)


def check_that_blocks_run_once(model: nn.Module) -> None:
    calls: list[int] = []
    for i in range(4):
        block = model.get_submodule(f"model.layers.{i}")
        block.register_forward_hook(lambda module, args, out, i=i: calls.append(i))
    tokens = torch.ones(1, 4, dtype=torch.long)
    partitions = get_model_adapter(model).partition(4, show=False)
    with torch.no_grad():
        expected = outputs_of(model(tokens))
        calls.clear()
        check_chained(partitions, (tokens,), expected)
    assert calls == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt2", "llama", "mixtral", "qwen2"])
def test_attention_that_is_changed_after_the_cut_is_told(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model: Any = architecture.make().eval()
    adapter = get_model_adapter(model)
    partitions = adapter.partition(2, show=False)
    inputs = architecture.inputs(rows=3)
    given = tuple(inputs.get(n) for n in adapter.inputs)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="attention 'sdpa' and computes 'eager' now"):
            partitions[0](*given)
        model.set_attn_implementation("sdpa")
        check_chained(partitions, given, outputs_of(model(**inputs)))


@pytest.mark.parametrize("name", ["bert decoder", "bert decoder backbone", "llama", "gpt2"])
def test_no_stage_returns_a_cache(name: str) -> None:
    model = ALL[name].make(use_cache=True).eval()
    tokens = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        expected = outputs_of(model(tokens, use_cache=False))
        check_chained(get_model_adapter(model).partition(2, show=False), (tokens,), expected)


def test_an_unknown_type_is_told() -> None:
    config = hf.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(
        ValueError, match=r"no adapter for T5Model \(model type 't5'\).*register_ada"
    ):
        get_model_adapter(hf.T5Model(config))


def test_a_family_of_ones_own() -> None:
    model: Any = ARCHITECTURES["llama"].make().eval()
    model.config.model_type = "lama"
    with pytest.raises(ValueError, match="model type 'lama'"):
        get_model_adapter(model)
    adapter = HuggingFaceAdapter(model, FAMILIES["llama"])
    tokens = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        check_chained(adapter.partition(2, show=False), (tokens,), outputs_of(model(tokens)))


def test_a_batch_that_cannot_be_split_is_told() -> None:
    def step(rank: int, size: int) -> str:
        partition = get_model_adapter(ARCHITECTURES["llama"].make()).partition(size, show=False)
        pipeline = DualPipe([partition[rank]] * 2)
        tokens = torch.ones(4, 4, dtype=torch.long)
        positions = torch.arange(4)[None]  # of one row, for all rows of a batch
        with pytest.raises((ValueError, PipelineError)) as caught, torch.no_grad():
            pipeline.step(tokens, None, positions, num_chunks=4)
        return str(caught.value)

    for text in run_ranks(step, 2):
        assert "inputs differ in their number of rows along dim 0: [1, 4]" in text


def test_more_inputs_than_a_model_takes_are_told() -> None:
    first = get_model_adapter(ARCHITECTURES["llama"].make()).partition(2, show=False)[0]
    with pytest.raises(ValueError, match=r"4 inputs were given to step.*input_ids, attention_mask"):
        first(*[torch.ones(1, 4, dtype=torch.long)] * 4)


def script_of_the_page(number: int, folder: Path) -> Path:
    page = Path(__file__).resolve().parents[2] / "docs" / "your_model.md"
    codes = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    script = folder / "page.py"
    script.write_text(codes[number])
    return script


def test_ten_lines_train_as_in_one_piece(tmp_path: Path) -> None:
    script = script_of_the_page(0, tmp_path)
    printed = torchrun_here(("--standalone", "--nproc-per-node", 2, script))
    (found,) = re.findall(r"^loss (\d+\.\d{4})$", printed, re.MULTILINE)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(10):
            text = (torch.randint(100, (16, 1)) + torch.arange(12)) % 100
            loss = model(input_ids=text, labels=text).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert float(found) == pytest.approx(float(loss.detach()), abs=1e-4)


def test_the_page_trains_as_in_one_piece(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = script_of_the_page(1, tmp_path)
    run_here(script)
    printed = capfd.readouterr().out
    found = {
        (int(step), int(rank)): float(loss)
        for step, rank, loss in re.findall(r"step (\d+), rank (\d): loss (\d+\.\d{4})", printed)
    }
    expected = dict(losses_of_the_page(runpy.run_path(str(script))))
    assert found == pytest.approx(expected, abs=1e-4)
    assert expected[10, 0] < 0.9 * expected[1, 0]


def losses_of_the_page(page: dict[str, Any]) -> Iterator[tuple[tuple[int, int], float]]:
    """((step, rank), loss) of the page's model in one piece."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(page["CONFIG"])
        text = torch.randint(100, (2, 16, 12)).cumsum(-1) % 100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 11):
        for rank in (0, 1):  # at rank 0 leaves what entered at rank 1
            loss = torch.zeros(())
            for rows in text[1 - rank].split(4):
                loss = loss + page["next_token"](model(rows).logits, rows)
            loss.backward()
            yield (step, rank), loss.item()
        optimizer.step()
        optimizer.zero_grad()
