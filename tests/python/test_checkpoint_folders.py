"""The last complete checkpoint stays, whatever happens to the next one; mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cut_off_saves import load, load_another, save, save_cut_off, save_replicas
from outcomes import outcomes
from torch import nn

from dualpipe_ext.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dualpipe_ext.testing import run_ranks


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


def saved(folder: Path, *steps: int, keep: int | None = None) -> None:
    run_ranks(save, 2, args=(folder, list(steps), {"keep": keep}))


def values(folder: Path) -> set[float]:
    return set(run_ranks(load, 2, args=(folder,)))


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_failing_rank_fails_the_save_on_all(on_rank: int, tmp_path: Path) -> None:
    found = run_ranks(save_cut_off, 2, args=(tmp_path, on_rank, False))
    for rank, outcome in enumerate(found):
        assert outcome.is_a("OSError" if rank == on_rank else "PipelineError"), outcome
        assert "No space left on device" in outcome.text
    other = found[1 - on_rank].text
    assert other.startswith(f"rank {on_rank} could not save the checkpoint: OSError")
    assert names(tmp_path) == ["step-00000001"]
    assert values(tmp_path) == {1.0}


def test_a_killed_rank_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 0 died with exit code -9"):
        run_ranks(save_cut_off, 2, "processes", (tmp_path, 0, True))
    draft, complete = names(tmp_path)
    assert draft.endswith(".unfinished") and complete == "step-00000001"
    assert latest_checkpoint(tmp_path) == tmp_path / complete
    assert values(tmp_path) == {1.0}
    saved(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]  # nothing is left of it
    assert values(tmp_path) == {3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What two replicas of two ranks came to; ranks 1 and 3 are the second one."""
    return run_ranks(save_replicas, 4, "processes", (folder,))


def test_the_first_replica_saves_for_all(found: list[dict[str, Any]], folder: Path) -> None:
    assert names(folder) == ["step-00000001"]
    for each in found:
        assert each["place"] == folder / "step-00000001"
        assert each["drawn"] == each["drawn again"] and each["knows"] and not each["alone knows"]
        assert each["went on"] == [True, True]  # in shards and whole
        assert each["mean"] == {1.5}  # of ranks 0 to 3
        assert "No space left on device" in each["failed"].text
    assert len({tuple(each["drawn"]) for each in found}) == 4
    assert found[3]["failed"].text.startswith("replica 0 could not save the checkpoint")


def test_the_first_replica_chooses_what_all_load(found: list[dict[str, Any]], folder: Path) -> None:
    for each in found:
        assert each["chosen"] == folder / "step-00000001"
    assert [each["nowhere"].error for each in found] == [
        "FileNotFoundError",
        "PipelineError",
        "PipelineError",
        "PipelineError",
    ]


def test_a_rank_that_cannot_load_is_told_to_all_replicas(found: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(found):
        outcome = each["unloaded"]
        assert outcome.error == ("ValueError" if rank == 3 else "PipelineError"), outcome
        assert "the optimizer here is" in outcome.text
        assert outcome.seconds < 10 and each["unchanged"]
    assert found[0]["unloaded"].text.startswith("replica 1 could not load the checkpoint")
    assert found[1]["unloaded"].text.startswith("rank 1 could not load the checkpoint")


def test_a_checkpoint_without_its_last_file_does_not_count(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "checkpoint.json").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    saved(tmp_path, 2)  # went back, and saves the same step again
    assert names(tmp_path) == ["step-00000002-2", "step-00000003"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000002-2"
    assert values(tmp_path) == {2.0}
    assert values(tmp_path / "step-00000003") == {3.0}


def test_another_architecture_is_told_on_every_rank(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for outcome, value in run_ranks(load_another, 2, args=(tmp_path,)):
        assert outcome.is_a("ValueError")
        assert "another architecture" in outcome.text
        assert "the model lacks stages.0.bias, stages.1.bias" in outcome.text
        assert "stages.0.weight is (3, 3) there and (4, 4) here" in outcome.text
        assert value == -1.0
    for outcome in outcomes(load, 4, args=(tmp_path,)):
        assert outcome.is_a("ValueError")
        assert (
            "it lacks stages.2.weight, stages.2.bias, stages.2._extra_state and 3" in outcome.text
        )


def test_mistakes_are_told(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        load_checkpoint(tmp_path, model)
    with pytest.raises(ValueError, match="step=-1"):
        save_checkpoint(tmp_path, model, step=-1)
    with pytest.raises(ValueError, match="keep=0"):
        save_checkpoint(tmp_path, model, step=1, keep=0)
    with pytest.raises(TypeError, match="keep=True"):
        save_checkpoint(tmp_path, model, step=1, keep=True)
    with pytest.raises(TypeError, match=r"step=1\.5"):
        save_checkpoint(tmp_path, model, step=1.5)  # type: ignore[arg-type]
    save_checkpoint(tmp_path, model, sgd, step=1)
    with pytest.raises(ValueError, match="with the optimizer SGD, and the optimizer here is AdamW"):
        load_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()))
    scheduler = torch.optim.lr_scheduler.ConstantLR(sgd)
    with pytest.raises(ValueError, match="saved without scheduler"):
        load_checkpoint(tmp_path, model, sgd, scheduler)
    save_checkpoint(tmp_path, model, sgd, scheduler, step=1)
    other = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
    with pytest.raises(ValueError, match="scheduler ConstantLR, and the scheduler here is Expo"):
        load_checkpoint(tmp_path, model, sgd, other)
    frozen = torch.optim.SGD([model.weight], lr=0.1)
    save_checkpoint(tmp_path, model, frozen, step=1)
    with pytest.raises(ValueError, match="trains bias, which that of the checkpoint did not"):
        load_checkpoint(tmp_path, model, sgd)
