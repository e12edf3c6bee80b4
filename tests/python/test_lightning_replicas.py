"""Lightning's trainer over pipelines side by side: the numbers of the trainer on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning_replicas import run_all
from lightning_runs import WARNINGS, History, Run, check, run_in_one_process
from replica_checks import check_failures, check_other_batches, check_refused, check_seeds

from dualpipe_ext.testing import run_ranks

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]
RUNS: dict[str, dict[str, Any]] = {
    "clipped": {"gradient_clip_val": 0.2},
    "accumulated": {"accumulate_grad_batches": 4, "max_steps": 3},
    "padded": {"max_steps": 6},
}
SAVED = "clipped"
REFUSED = {
    "DualPipeStrategy(num_stages=3) has pipelines of 3 ranks, and Trainer starts 4": "ValueError",
    "the module was cut into 2 stages by an earlier trainer": "ValueError",
    "in Lightning DualPipeStrategy(num_stages=2)": "ValueError",
    "has its state in shards": "TypeError",
}


def jobs(folder: Path) -> dict[str, Run]:
    """The runs, and one that goes on from the first epoch of the one that is saved."""
    found = {
        name: Run(str(folder / name) if name == SAVED else "", options, is_padded=name == "padded")
        for name, options in RUNS.items()
    }
    path = str(folder / SAVED / "epoch=0.ckpt")
    return {**found, "resumed": Run(str(folder / "resumed"), RUNS[SAVED], resume=path)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lightning_replicas")


@pytest.fixture(scope="module")
def unsplit(folder: Path) -> dict[str, History]:
    return {name: run_in_one_process(job) for name, job in jobs(folder / "unsplit").items()}


@pytest.fixture(scope="module")
def replicas(folder: Path) -> list[dict[str, Any]]:
    """What two pipelines of two ranks came to, by rank of the default group."""
    return run_ranks(run_all, 4, "processes", (jobs(folder / "replicas"),), timeout=150.0)


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_trains_as_on_one_process(
    name: str, unsplit: dict[str, History], replicas: list[dict[str, Any]]
) -> None:
    for found in replicas:
        check(found[name], unsplit[name], 1e-5)


def test_an_unsplit_run_goes_on_with_its_checkpoint(
    folder: Path, unsplit: dict[str, History], replicas: list[dict[str, Any]]
) -> None:
    path = str(folder / "replicas" / SAVED / "epoch=0.ckpt")
    found = run_in_one_process(Run(str(folder / "resumed unsplit"), RUNS[SAVED], resume=path))
    check(found, unsplit["resumed"], 1e-5)


def test_replicas_draw_other_random_numbers(replicas: list[dict[str, Any]]) -> None:
    check_seeds(replicas)


def test_statistics_are_those_of_all_copies(replicas: list[dict[str, Any]]) -> None:
    within, after = replicas[0]["normed"]
    assert within == pytest.approx(after, rel=1e-6)
    assert all(found["normed"] == [within, after] for found in replicas)


def test_a_failure_is_told_to_all_replicas(replicas: list[dict[str, Any]]) -> None:
    raised = {
        "unsaved": (0, "OSError", "No space left on device"),
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
