"""Making a module defer its weight gradients, and the report about it."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deferral import (
    BATCH,
    HIDDEN,
    MLP,
    WIDTH,
    assert_equal,
    assert_same_grads,
    has_no_grads,
    leaf,
    loss_of,
    pair,
    plain_step,
    split_step,
    twin,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dualpipe_ext import _C
from dualpipe_ext.weight_grad import defer_weight_gradients, undo_defer_weight_gradients
from dualpipe_ext.weight_report import WeightSplit, weight_split


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_outside_of_an_engine_nothing_changes() -> None:
    model, reference = pair(MLP())
    x = leaf(BATCH, WIDTH)
    y = twin(x)
    assert_equal(plain_step(model, x), plain_step(reference, y))
    assert_equal(x.grad, y.grad)
    assert_same_grads(model, reference)
    (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    grad.sum().backward()


def test_names_and_module_hooks_stay_and_twice_is_harmless() -> None:
    model = MLP()
    names = list(model.state_dict())
    calls: list[int] = []
    model.up.register_forward_hook(lambda *_: calls.append(1))
    defer_weight_gradients(model)
    defer_weight_gradients(model)
    queue = _C.WeightQueue()
    split_step(queue, model, leaf(BATCH, WIDTH))
    assert list(model.state_dict()) == names
    assert calls == [1]
    assert queue.num_pending == 2


def test_undo() -> None:
    queue = _C.WeightQueue()
    model = MLP()
    defer_weight_gradients(model)
    undo_defer_weight_gradients(model)
    assert "forward" not in vars(model.up)
    split_step(queue, model, leaf(BATCH, WIDTH))
    assert queue.num_pending == 0
    assert not has_no_grads(model)


def test_deep_copy_defers_for_its_own_parameters() -> None:
    queue = _C.WeightQueue()
    model = MLP()
    defer_weight_gradients(model)
    copied = copy.deepcopy(model)
    split_step(queue, copied, leaf(BATCH, WIDTH))
    assert has_no_grads(copied)
    queue.run(0, 0)
    assert not has_no_grads(copied)
    assert has_no_grads(model)


def test_a_layer_is_freed_with_its_last_reference() -> None:
    layer, _ = pair(nn.Linear(WIDTH, HIDDEN))
    weight = weakref.ref(layer.weight)
    forward = layer.forward
    gc.disable()
    try:
        del layer
        assert weight() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="keep the layer"):
        forward(torch.randn(BATCH, WIDTH))


def test_unpickled_module_is_plain_and_can_defer_again() -> None:
    queue = _C.WeightQueue()
    model = MLP()
    defer_weight_gradients(model)
    loaded = pickle.loads(pickle.dumps(model))
    x = torch.randn(BATCH, WIDTH)
    assert_equal(loaded(x), model(x))
    split_step(queue, loaded, x)
    assert queue.num_pending == 0
    assert not has_no_grads(loaded)
    assert has_no_grads(model)
    defer_weight_gradients(loaded)
    split_step(queue, loaded, x)
    assert queue.num_pending == 2


class OwnLinear(nn.Linear):
    """A linear layer with another forward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


def test_other_forwards_are_left_alone() -> None:
    own = OwnLinear(WIDTH, HIDDEN)
    replaced = nn.Linear(WIDTH, HIDDEN)
    vars(replaced)["forward"] = lambda x: x
    report = defer_weight_gradients(nn.Sequential(own, replaced, nn.LazyLinear(3)))
    assert "forward" not in vars(own)
    assert replaced(1) == 1
    wanted = [WeightSplit.STORE, WeightSplit.STORE, WeightSplit.NONE]
    assert [m.split for m in report.modules] == wanted


class Mixed(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)
        self.own = OwnLinear(10, 10, bias=False)
        self.norm = nn.LayerNorm(10)
        self.normed = parametrizations.weight_norm(nn.Linear(10, 10))
        self.frozen = nn.Linear(10, 10).requires_grad_(False)
        self.attention = nn.MultiheadAttention(10, 2)
        self.scale = nn.Parameter(torch.ones(10))
        self.tied = nn.Linear(10, 10, bias=False)
        self.tied.weight = self.linear.weight


def test_report_counts_every_weight_once_and_says_why() -> None:
    model = Mixed()
    report = defer_weight_gradients(model)
    by_name = {m.name: m for m in report.modules}
    assert by_name["linear"].split is WeightSplit.NATIVE
    assert by_name["linear"].num_weights == 110
    assert by_name["tied"].num_weights == 0
    assert by_name["own"].split is WeightSplit.STORE
    assert by_name["own"].reason == "OwnLinear has a forward of its own"
    assert by_name[""].split is WeightSplit.STORE
    assert by_name["norm"].split is WeightSplit.NONE
    assert by_name["normed"].reason == "its weight is computed from other parameters"
    assert by_name["frozen"].reason == "frozen" and by_name["frozen"].num_weights == 0
    assert by_name["attention.out_proj"].split is WeightSplit.NONE
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.num_weights() == total
    assert report.num_weights(WeightSplit.NATIVE) == 110
    assert report.share(WeightSplit.NATIVE) == 110 / total
    assert sum(report.share(split) for split in WeightSplit) == pytest.approx(1)


def test_weight_tied_to_an_embedding_counts_as_deferred() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    vars(model["head"])["_parameters"]["weight"] = model["embedding"].weight
    report = defer_weight_gradients(model)
    assert [m.num_weights for m in report.modules] == [0, 36]


def test_compiled_layers_count_as_computed_at_once() -> None:
    within = nn.Sequential(nn.Linear(4, 4))
    within.compile(backend="eager")
    wrapped: Any = torch.compile(MLP(), backend="eager")
    report = weight_split(nn.ModuleList([within, wrapped, nn.Linear(4, 4)]))
    found = {m.name: (m.split, m.reason) for m in report.modules}
    compiled = (WeightSplit.NONE, "torch.compile computes it, and its gradients at once")
    assert found.pop("2") == (WeightSplit.NATIVE, "")
    assert list(found) == ["0.0", "1._orig_mod.up", "1._orig_mod.down"]
    assert set(found.values()) == {compiled}


def test_report_is_a_table_and_data() -> None:
    report = defer_weight_gradients(Mixed())
    lines = str(report).splitlines()
    assert lines[0].split() == ["share", "weights", "gradients"]
    assert any(line.endswith("deferred natively") and " 110 " in line for line in lines)
    assert any(line.startswith("norm ") and "LayerNorm" in line for line in lines)
    assert not any(line.startswith("linear ") for line in lines)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["num_weights"] == report.num_weights()
    assert set(data["shares"]) == {"native", "store", "none"}
    assert len(data["modules"]) == len(report.modules)


def test_report_of_a_module_without_parameters() -> None:
    report = defer_weight_gradients(nn.GELU())
    assert report.modules == () and report.share(WeightSplit.NATIVE) == 0
    assert "0.0%" in str(report)
