"""Weights go to folders of ``save_pretrained`` and come back, whatever the model is cut into."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hf_models import ARCHITECTURES
from outcomes import outcomes
from saved_runs import check_same
from torch import nn

from dualpipe_ext import DualPipe
from dualpipe_ext.adapters import empty_parameters, get_model_adapter
from dualpipe_ext.checkpoint import export_pretrained, import_pretrained
from dualpipe_ext.testing import run_ranks

NAMES = ["gpt2", "llama", "gemma", "mixtral", "deepseek_v3", "bert", "vit"]


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def cut(rank: int, size: int, model: nn.Module) -> DualPipe:
    partition = get_model_adapter(model).partition(size, show=False)[rank]
    if any(parameter.is_meta for parameter in partition.parameters()):
        partition.to_empty(device="cpu")
    return DualPipe([partition, partition])


def states(found: list[DualPipe]) -> dict[str, Any]:
    return {name: x for p in found for module in p.module for name, x in state_of(module).items()}


def export(rank: int, size: int, folder: Path, model: nn.Module, empty: nn.Module) -> None:
    pipeline = cut(rank, size, copy.deepcopy(model))
    export_pretrained(folder, pipeline, empty, scratch=folder.parent, timeout=60.0)


def fetch(rank: int, size: int, folder: Path, empty: nn.Module) -> DualPipe:
    """No rank but the first ever has more than its part."""
    pipeline = cut(rank, size, copy.deepcopy(empty))
    import_pretrained(folder, pipeline, empty, scratch=folder.parent, timeout=60.0)
    return pipeline


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_and_come_back(name: str, tmp_path: Path) -> None:
    model: Any = ARCHITECTURES[name].make()
    with empty_parameters():
        empty = ARCHITECTURES[name].make()
    expected = state_of(model)
    run_ranks(export, 2, args=(tmp_path / "model", model, empty))
    assert [child.name for child in tmp_path.iterdir()] == ["model"]
    check_same(state_of(type(model).from_pretrained(tmp_path / "model")), expected)
    check_same(states(run_ranks(fetch, 4, args=(tmp_path / "model", empty))), expected)
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_weights_of_another_model_are_told(tmp_path: Path) -> None:
    ARCHITECTURES["llama"].make(num_hidden_layers=5).save_pretrained(tmp_path)  # type: ignore[operator]
    for outcome in outcomes(fetch, 2, args=(tmp_path, ARCHITECTURES["llama"].make())):
        assert outcome.is_a("ValueError")
        assert "the model lacks model.layers.4." in outcome.text


def test_a_model_that_cannot_be_exported_is_told(tmp_path: Path) -> None:
    models = (ARCHITECTURES["llama"].make(), nn.Linear(2, 2))
    for outcome in outcomes(export, 2, args=(tmp_path, *models)):
        assert outcome.is_a("TypeError") and "a Linear has no save_pretrained()" in outcome.text
