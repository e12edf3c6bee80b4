"""Settings: what is allowed, and their way to files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from outcomes import outcomes
from plain_models import GPT
from torch import nn

from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline, setup_dual_pipe

CHANGED = DualPipeConfig(
    num_stages=4,
    num_microbatches=8,
    schedule="1f1b",
    overlap_strategy="none",
    memory_optimization="offload",
    lookahead=1,
    timeout=2.5,
    bucket_bytes=1024,
    seed=7,
    balance=[1, 2, 1, 0],
)


def test_travels_as_a_dictionary() -> None:
    assert DualPipeConfig.from_dict(CHANGED.to_dict()) == CHANGED
    assert DualPipeConfig.from_dict({"lookahead": 5}) == DualPipeConfig(lookahead=5)


def test_travels_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    text = CHANGED.to_yaml(path)
    assert path.read_text() == text and "memory_optimization: offload\n" in text
    assert DualPipeConfig.from_yaml(path) == CHANGED
    path.write_text("")
    assert DualPipeConfig.from_yaml(path) == DualPipeConfig()


WRONG: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "a near miss": ({"num_stage": 4}, ValueError, ("'num_stage'", "did you mean 'num_stages'?")),
    "its name in a step": ({"num_chunks": 4}, ValueError, ("it is 'num_microbatches' here",)),
    "an unknown name": ({"zzz": 1}, ValueError, ("'zzz'", "there are num_stages, ")),
    "a number as text": ({"num_stages": "4"}, TypeError, ("num_stages='4'", "int, not str")),
    "a negative number": ({"num_stages": -2}, ValueError, ("num_stages=-2", "at least 0")),
    "an unknown strategy": (
        {"overlap_strategy": "some"},
        ValueError,
        ("overlap_strategy='some'", "'full' or 'none'"),
    ),
    "an unknown way of saving": (
        {"memory_optimization": "activation_checkpointing"},
        ValueError,
        ("'none', 'activation_checkpoint' or 'offload'",),
    ),
    "a schedule that is no name": ({"schedule": 3}, TypeError, ("schedule=3", "schedules()")),
    "an unknown balance": (
        {"balance": "speed"},
        ValueError,
        ("balance='speed'", "'parameters', 'memory' or 'time'"),
    ),
    "a balance with half a layer": ({"balance": [1, 0.5]}, TypeError, ("balance=0.5", "an int")),
    "a seed in words": ({"seed": "42"}, TypeError, ("seed='42'", "an int, not str")),
    "yes for true": (
        {"split_weight_gradients": "no"},
        TypeError,
        ("split_weight_gradients='no'", "a bool, not str"),
    ),
    "a timeout that is true": ({"timeout": True}, TypeError, ("timeout=True", "seconds")),
    "a timeout of 0": ({"timeout": 0}, ValueError, ("timeout=0", "above 0")),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name: str, tmp_path: Path) -> None:
    settings, error, parts = WRONG[name]
    with pytest.raises(error) as raised:
        DualPipeConfig.from_dict(settings)
    assert all(part in str(raised.value) for part in parts), raised.value
    path = tmp_path / "wrong.yaml"
    path.write_text("\n".join(f"{key}: {value!r}" for key, value in settings.items()))
    with pytest.raises(error, match=r"wrong\.yaml: "):
        DualPipeConfig.from_yaml(path)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n"])
def test_files_that_are_no_settings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises((ValueError, TypeError), match=r"wrong\.yaml"):
        DualPipeConfig.from_yaml(path)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"wrong\.yaml: .*0xff"):
        DualPipeConfig.from_yaml(path)


def test_no_overlap_means_none() -> None:
    resolved = DualPipeConfig(overlap_strategy="none", lookahead=3).resolved()
    assert (resolved.lookahead, resolved.split_weight_gradients, resolved.use_overlapped) == (
        0,
        False,
        False,
    )
    assert DualPipeConfig(lookahead=3).resolved() == DualPipeConfig(lookahead=3)


def test_setup_as_in_the_seed() -> None:
    config = setup_dual_pipe(GPT(num_blocks=4), num_stages=4)
    assert config == DualPipeConfig(
        num_stages=4,
        num_microbatches=8,
        overlap_strategy="full",
        memory_optimization="activation_checkpoint",
    )
    assert setup_dual_pipe(GPT(4), 4, memory_optimization="none", lookahead=1).lookahead == 1


@pytest.mark.parametrize(
    ("schedule", "num_microbatches", "part"),
    [
        ("dualpipe", 3, "use 8"),
        ("dualpipe", 9, "use 10"),
        ("dualpipev", 3, "at least 2 \\* num_ranks = 4"),
        ("1f2b", 8, "1f2b"),
    ],
)
def test_setup_of_what_the_schedule_does_not_serve(
    schedule: str, num_microbatches: int, part: str
) -> None:
    with pytest.raises(ValueError, match=part):
        setup_dual_pipe(GPT(4), 4, schedule=schedule, num_microbatches=num_microbatches)


def test_setup_with_sizes() -> None:
    assert setup_dual_pipe(GPT(4), 2, balance=[3, 1]).balance == (3, 1)
    assert setup_dual_pipe(GPT(4), 2, balance="time").balance == "time"
    with pytest.raises(ValueError, match="has 3 sizes for 2 stages"):
        setup_dual_pipe(GPT(4), 2, balance=[2, 1, 1])


@pytest.mark.parametrize(
    ("num_stages", "part"), [(3, "must be even"), (8, "has 4 layers"), (0, "at least 2")]
)
def test_setup_of_what_cannot_be_cut(num_stages: int, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        setup_dual_pipe(GPT(num_blocks=4), num_stages=num_stages)


def test_another_number_of_stages_is_an_error() -> None:
    def make(rank: int, size: int) -> object:
        config = DualPipeConfig(num_stages=4)
        return DualPipe([nn.Linear(2, 2), nn.Linear(2, 2)], config=config)

    for outcome in outcomes(make, 2):
        assert outcome.is_a("ValueError"), outcome
        assert "num_stages=4" in outcome.text and "configure num_stages=2" in outcome.text


def test_the_schedule_of_the_configuration() -> None:
    def make(rank: int, size: int) -> list[int]:
        return Pipeline([nn.Linear(2, 2)], config=DualPipeConfig(schedule="1f1b")).stages

    assert [outcome.value for outcome in outcomes(make, 2)] == [[0], [1]]
