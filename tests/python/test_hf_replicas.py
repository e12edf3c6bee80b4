"""Hugging Face's trainer over pipelines side by side: the numbers of the trainer on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_replicas import run_all
from replica_checks import check_failures, check_other_batches, check_refused, check_seeds
from trainers import History, Run, check, run_in_one_process

from dualpipe_ext.testing import run_ranks

SAVED = "gpt2, accumulated, saved"
# In the last batch that "llama" evaluates and "bert" is trained on, the second replica has no row.
RUNS: dict[str, dict[str, Any]] = {
    "llama, evaluated": {
        "arguments": {
            "eval_strategy": "epoch",
            "max_grad_norm": 0.3,
            "per_device_eval_batch_size": 5,
            "num_train_epochs": 1,
        },
    },
    SAVED: {
        "architecture": "gpt2",
        "arguments": {
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "cosine",
        },
    },
    "bert, a mean over rows": {
        "architecture": "bert classifier",
        "rows": 17,
        "model": {"num_labels": 1},
        "arguments": {"max_grad_norm": 0.3},
    },
}
REFUSED = {
    "it needs 'pp' and 'dp'": "ValueError",
    "leave out process_group=": "ValueError",
    "none may be in two of them": "ValueError",
    "have the numbers [": "ValueError",
    "the replicas have other stages": "ValueError",
    "replicas differ in bucket_bytes": "ValueError",
    "replicas differ in schedule": "ValueError",
    "has its state in shards": "TypeError",
}


def jobs(folder: Path) -> dict[str, Run]:
    return {name: Run(str(folder / name), **given) for name, given in RUNS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_replicas")


@pytest.fixture(scope="module")
def unsplit(folder: Path) -> dict[str, History]:
    return {name: run_in_one_process(job) for name, job in jobs(folder / "unsplit").items()}


@pytest.fixture(scope="module")
def replicas(folder: Path, unsplit: dict[str, History]) -> list[dict[str, Any]]:
    """What two pipelines of two ranks came to, by rank of the default group."""
    own = jobs(folder / "replicas")
    return run_ranks(run_all, 4, "processes", (own, own[SAVED]), timeout=150.0)


@pytest.mark.parametrize("name", RUNS)
def test_trains_as_on_one_process(
    name: str, unsplit: dict[str, History], replicas: list[dict[str, Any]]
) -> None:
    for found in replicas:
        check(found[name], unsplit[name], 1e-5)


def test_resumes_where_it_was(unsplit: dict[str, History], replicas: list[dict[str, Any]]) -> None:
    for found in replicas:
        check(found["resumed"], unsplit[SAVED], 1e-5)
        assert len(found["resumed"].losses) == len(unsplit[SAVED].losses) - 4


def test_an_unsplit_run_goes_on_with_its_checkpoint(
    folder: Path, unsplit: dict[str, History], replicas: list[dict[str, Any]]
) -> None:
    check(run_in_one_process(jobs(folder / "replicas")[SAVED], resume=2), unsplit[SAVED], 1e-5)


def test_one_rank_of_all_writes(replicas: list[dict[str, Any]]) -> None:
    assert [found["writes"] for found in replicas] == [True, False, False, False]


def test_replicas_draw_other_random_numbers(replicas: list[dict[str, Any]]) -> None:
    check_seeds(replicas)


def test_a_failure_is_told_to_all_replicas(replicas: list[dict[str, Any]]) -> None:
    raised = {
        "unsaved": (0, "OSError", "No space left on device"),
        "nothing to resume": (0, "ValueError", "there is no complete checkpoint in"),
        "not updated": (2, "RuntimeError", "out of luck"),
    }
    check_failures(replicas, raised)


def test_replicas_with_other_batches_are_refused(replicas: list[dict[str, Any]]) -> None:
    check_other_batches(replicas)


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_done_is_refused_on_every_rank(
    text: str, replicas: list[dict[str, Any]]
) -> None:
    check_refused(replicas, text, REFUSED[text])
