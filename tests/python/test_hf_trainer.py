"""Hugging Face's trainer over a pipeline: the numbers of the trainer on one process."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from trainers import (
    RECOMPUTING,
    History,
    Run,
    check,
    make_arguments,
    run_all,
    run_in_one_process,
    run_with_parts,
)

import dualpipe_ext.compat
from dualpipe_ext.compat import DualPipeTrainer
from dualpipe_ext.compat.huggingface.arguments import REFUSED, accepted, recomputes
from dualpipe_ext.testing import run_ranks

# What the trainer may be asked for, as an unsplit run and one over two ranks.
RUNS: dict[str, dict[str, Any]] = {
    "llama, evaluated and logged": {
        "arguments": {"eval_strategy": "epoch", "max_grad_norm": 0.3, "warmup_steps": 2},
        "options": {"enable_profiling": True},
    },
    "gpt2, accumulated, saved": {
        "architecture": "gpt2",
        "arguments": {
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "cosine",
        },
    },
    "bert, the best one at the end": {
        "architecture": "bert",
        "arguments": {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "max_grad_norm": 0.0,
            RECOMPUTING: True,
        },
    },
    "bert, accumulated": {  # its loss is the mean of a batch, whatever the trainer asks for
        "architecture": "bert",
        "rows": 16,
        "arguments": {"gradient_accumulation_steps": 2},
    },
    "llama, streamed": {"is_streamed": True, "arguments": {"max_steps": 4}},
    "vit, accumulated over an odd epoch": {
        "architecture": "vit",
        "arguments": {"gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1},
    },
    "bert, a regression to whole numbers": {
        "architecture": "bert classifier",
        "rows": 20,
        "model": {"num_labels": 1},
        "arguments": {"eval_strategy": "epoch", "max_grad_norm": 0.3},
    },
    "llama in bfloat16": {"arguments": {"bf16": True, "num_train_epochs": 1}},
}
RESUMED = "gpt2, accumulated, saved"


def jobs(folder: Path) -> dict[str, Run]:
    return {name: Run(str(folder / name), **given) for name, given in RUNS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture(scope="module")
def unsplit(folder: Path) -> dict[str, History]:
    return {n: run_in_one_process(job) for n, job in jobs(folder / "unsplit").items()}


@pytest.fixture(scope="module")
def pipeline(folder: Path, unsplit: dict[str, History]) -> list[dict[str, History]]:
    """All runs, by rank: starting processes takes longer than training in them."""
    own = jobs(folder / "pipeline")
    args = (own, own[RESUMED], jobs(folder / "unsplit")[RESUMED])
    return run_ranks(run_all, 2, "processes", args)


@pytest.fixture(scope="module")
def parts(folder: Path, unsplit: dict[str, History]) -> list[dict[str, Any]]:
    """The run that is saved, over ranks that have two of four stages each."""
    return run_ranks(run_with_parts, 4, "processes", (jobs(folder / "parts")[RESUMED],))


@pytest.mark.parametrize("name", RUNS)
def test_trains_as_on_one_process(
    name: str, unsplit: dict[str, History], pipeline: list[dict[str, History]]
) -> None:
    for found in pipeline:
        check(found[name], unsplit[name], 2e-2 if "bfloat16" in name else 1e-5)


@pytest.mark.parametrize("name", ["resumed", "resumed from an unsplit run"])
def test_resumes_where_it_was(
    name: str, unsplit: dict[str, History], pipeline: list[dict[str, History]]
) -> None:
    for found in pipeline:
        check(found[name], unsplit[RESUMED], 1e-5)
        assert len(found[name].losses) == len(unsplit[RESUMED].losses) - 4


def test_random_numbers_depend_on_the_batch_alone(pipeline: list[dict[str, History]]) -> None:
    """Not on where the run was begun, or whether the model was evaluated in between."""
    for found in pipeline:
        once, again = found["noisy"].losses, found["noisy, evaluated and resumed"].losses
        assert again == pytest.approx(once[4:], rel=1e-6) and len(set(once)) == len(once)


@pytest.mark.parametrize("name", ["once", "resumed"])
def test_ranks_with_a_part_of_the_model_save_and_resume_all_of_it(
    name: str, unsplit: dict[str, History], parts: list[dict[str, Any]]
) -> None:
    for found in parts:
        check(found[name], unsplit[RESUMED], 1e-5)
        assert found["are own"] == {True}  # no memory for states of stages that are elsewhere


def test_a_failing_write_is_told_to_all_ranks(parts: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(parts):
        for outcome in (found["unsaved"], found["no checkpoint"]):
            assert outcome.error == ("PipelineError" if rank else "OSError"), outcome
            assert "No space left on device" in outcome.text and outcome.seconds < 20
            assert rank == 0 or outcome.text.startswith("rank 0 could not save the model")


def test_an_optimizer_that_raises_is_told_to_all_ranks(parts: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(parts):
        outcome = found["not updated"]
        assert outcome.error == ("RuntimeError" if rank == 1 else "PipelineError"), outcome
        assert "out of luck" in outcome.text and outcome.seconds < 20


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(parts: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(parts):
        step, last = found["went on to"]
        assert step == last > 2
        nothing = found["nothing to resume"]
        assert nothing.error == ("PipelineError" if rank else "ValueError"), nothing
        assert "there is no complete checkpoint in" in nothing.text


@pytest.mark.parametrize("ranks", ["pipeline", "parts"])
def test_an_unsplit_run_goes_on_with_its_checkpoint(
    ranks: str, folder: Path, unsplit: dict[str, History], request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(ranks)
    check(run_in_one_process(jobs(folder / ranks)[RESUMED], resume=2), unsplit[RESUMED], 1e-5)


def test_logs_the_times_of_the_pipeline(pipeline: list[dict[str, History]]) -> None:
    log = pipeline[0]["llama, evaluated and logged"].logs[0]
    assert 0 < log["pipeline_busy_seconds"] <= log["pipeline_step_seconds"]
    assert 0 <= log["pipeline_bubble"] < 1


def test_every_setting_that_is_not_honoured_is_refused(tmp_path: Path) -> None:
    given = make_arguments(str(tmp_path))
    accepted(given)
    for name in REFUSED:
        with pytest.raises(ValueError, match=rf"TrainingArguments\({name}=.*cannot be honoured"):
            accepted(with_setting(given, name, 1))
    for optimizer in ("lomo", "galore_adamw_layerwise"):
        with pytest.raises(ValueError, match=r"optim=.*before gradients are summed"):
            accepted(with_setting(given, "optim", optimizer))


def test_the_model_itself_does_not_recompute(tmp_path: Path) -> None:
    given = make_arguments(str(tmp_path), **{RECOMPUTING: True})
    assert recomputes(given) and not recomputes(accepted(given))


def test_a_loss_of_ones_own_is_refused(tmp_path: Path) -> None:
    class Own(DualPipeTrainer):
        def compute_loss(self, *_: Any, **__: Any) -> None: ...

    with pytest.raises(ValueError, match=r"Own\.compute_loss would not be called"):
        Own(nn.Linear(1, 1), make_arguments(str(tmp_path)))
    with pytest.raises(ValueError, match="does not take compute_loss_func"):
        DualPipeTrainer(nn.Linear(1, 1), compute_loss_func=print)


def test_a_trainer_without_ranks_says_how_to_start_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        DualPipeTrainer(nn.Linear(1, 1), make_arguments(str(tmp_path)))


@pytest.mark.parametrize("missing", ["transformers", "accelerate.state"])
def test_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("dualpipe_ext.compat.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ImportError, match=rf"needs {missing.partition('.')[0]}, .*\[transformers\]"
    ):
        _ = dualpipe_ext.compat.DualPipeTrainer


def with_setting(args: Any, name: str, value: Any) -> Any:
    args = copy.copy(args)
    setattr(args, name, value)
    return args
