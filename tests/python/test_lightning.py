"""Lightning's trainer over a pipeline: the numbers of the trainer on one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_runs import (
    REFUSED,
    WARNINGS,
    History,
    Run,
    Split,
    check,
    make_loader,
    make_trainer,
    run_all,
    run_in_one_process,
    run_with_parts,
)

import dualpipe_ext.compat
from dualpipe_ext.testing import run_ranks

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]
RUNS: dict[str, dict[str, Any]] = {
    "clipped": {"gradient_clip_val": 0.2},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 4},
    "double precision": {"precision": "64-true"},
    "bfloat16": {"precision": "bf16-mixed", "max_steps": 6},
    "padded": {"max_steps": 6},
}
SAVED = "clipped"


def jobs(folder: Path) -> dict[str, Run]:
    return {
        name: Run(str(folder / name) if name == SAVED else "", options, is_padded=name == "padded")
        for name, options in RUNS.items()
    }


def resumed(checkpoints: Path, folder: Path) -> Run:
    """The run that is saved, from its first epoch on."""
    path = str(checkpoints / SAVED / "epoch=0.ckpt")
    return Run(str(folder), RUNS[SAVED], resume=path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def unsplit(folder: Path) -> dict[str, History]:
    own = jobs(folder / "unsplit")
    own["resumed"] = resumed(folder / "unsplit", folder / "unsplit, resumed")
    return {name: run_in_one_process(job) for name, job in own.items()}


@pytest.fixture(scope="module")
def pipeline(folder: Path, unsplit: dict[str, History]) -> list[dict[str, Any]]:
    """All runs, by rank: starting processes takes longer than training in them."""
    own = jobs(folder / "pipeline")
    own["resumed"] = resumed(folder / "pipeline", folder / "resumed")
    own["resumed from an unsplit run"] = resumed(folder / "unsplit", folder / "from unsplit")
    return run_ranks(run_all, 2, "processes", (own,))


@pytest.fixture(scope="module")
def parts(folder: Path, unsplit: dict[str, History]) -> list[dict[str, Any]]:
    """The run that is saved, over ranks that have two of four stages each, and from its middle."""
    own = {SAVED: jobs(folder / "parts")[SAVED]}
    own["resumed"] = resumed(folder / "parts", folder / "parts, resumed")
    return run_ranks(run_with_parts, 4, "processes", (own,))


@pytest.mark.parametrize("name", RUNS)
def test_trains_as_on_one_process(
    name: str, unsplit: dict[str, History], pipeline: list[dict[str, Any]]
) -> None:
    for found in pipeline:
        check(found[name], unsplit[name], 1e-2 if name == "bfloat16" else 1e-5)


def test_logs_on_the_first_rank_what_one_process_does(
    unsplit: dict[str, History], pipeline: list[dict[str, Any]]
) -> None:
    expected, found = unsplit[SAVED].logs, pipeline[0][SAVED].logs
    assert expected.keys() == found.keys() >= {"train_loss", "val_loss", "lr-AdamW/pg1", "epoch"}
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name
    assert len(found["train_loss"]) == 18 and len(found["val_loss"]) == 3


def test_bfloat16_is_another_type(pipeline: list[dict[str, Any]]) -> None:
    found = pipeline[0]
    assert found["bfloat16"].predictions.dtype == torch.bfloat16
    assert found["bfloat16"].losses[0] != found[SAVED].losses[0]


@pytest.mark.parametrize("name", ["resumed", "resumed from an unsplit run"])
def test_resumes_where_it_was(
    name: str, unsplit: dict[str, History], pipeline: list[dict[str, Any]]
) -> None:
    for found in pipeline:
        check(found[name], unsplit["resumed"], 1e-5)
    assert len(unsplit["resumed"].losses) == 12


@pytest.mark.parametrize("name", [SAVED, "resumed"])
def test_ranks_with_a_part_of_the_model_save_and_resume_all_of_it(
    name: str, unsplit: dict[str, History], parts: list[dict[str, Any]]
) -> None:
    for found in parts:
        check(found[name], unsplit[name], 1e-5)


@pytest.mark.parametrize("ranks", ["pipeline", "parts"])
def test_an_unsplit_run_goes_on_with_its_checkpoint(
    ranks: str, folder: Path, unsplit: dict[str, History], request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(ranks)
    job = resumed(folder / ranks, folder / f"{ranks} resumed unsplit")
    check(run_in_one_process(job), unsplit["resumed"], 1e-5)


def test_a_module_is_read_from_a_checkpoint(
    folder: Path, unsplit: dict[str, History], pipeline: list[dict[str, Any]]
) -> None:
    path = folder / "pipeline" / SAVED / "epoch=2.ckpt"
    module = Split.load_from_checkpoint(path, num_chunks=4)
    torch.testing.assert_close(dict(module.state_dict()), pipeline[0][SAVED].state, rtol=0, atol=0)


def test_dropout_differs_from_step_to_step_and_not_from_run_to_run(
    pipeline: list[dict[str, Any]],
) -> None:
    once, again = pipeline[0]["noisy"]
    assert len(set(once)) == 3 and once == again
    assert pipeline[0]["noisy, resumed"] == once[1:]


def test_steps_leave_the_generator_as_it_was(pipeline: list[dict[str, Any]]) -> None:
    for found in pipeline:
        assert len(set(found["numbers drawn"])) == 1, found["numbers drawn"]


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:0", "cpu:gloo,cuda:nccl")])
def test_ranks_on_gpus_exchange_what_is_on_the_host_too(device: str, backend: str) -> None:
    strategy = dualpipe_ext.compat.DualPipeStrategy()
    strategy.parallel_devices = [torch.device(device)]
    assert strategy._get_process_group_backend() == backend


def test_another_strategy_is_refused() -> None:
    trainer = make_trainer(Run(), [], devices=1)
    with pytest.raises(TypeError, match=r"use Trainer\(strategy=DualPipeStrategy\(\)"):
        trainer.validate(Split(4), make_loader(8, 0, False))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_on_every_rank(
    name: str, pipeline: list[dict[str, Any]]
) -> None:
    for found in pipeline:
        assert found[name].is_a("ValueError", "TypeError"), found[name]
        assert name in found[name].text


def test_a_model_of_which_a_rank_has_a_part_is_not_called(parts: list[dict[str, Any]]) -> None:
    for found in parts:
        assert found["measured"].is_a("ValueError"), found["measured"]
        assert "Perceptron was called while it is trained" in found["measured"].text


def test_an_optimizer_that_raises_is_told_to_all_ranks(parts: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(parts):
        outcome = found["not updated"]
        assert outcome.error == ("RuntimeError" if rank == 1 else "PipelineError"), outcome
        assert "out of luck" in outcome.text and outcome.seconds < 20


def test_a_failing_write_is_told_to_all_ranks(parts: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(parts):
        outcome = found["unsaved"]
        assert outcome.error == ("PipelineError" if rank else "OSError"), outcome
        assert "No space left on device" in outcome.text and outcome.seconds < 20
        assert rank == 0 or outcome.text.startswith("rank 0 could not write the checkpoint")


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("dualpipe_ext.compat.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"needs lightning, .*\[lightning\]"):
        _ = dualpipe_ext.compat.DualPipeLightningModule
