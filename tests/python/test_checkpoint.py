"""What is saved on 4 ranks goes on, on any number of them, as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import outcomes
from saved_runs import (
    OPTIMIZERS,
    Half,
    Run,
    check_close,
    check_same,
    joined,
    make_model,
    resume,
    resume_another,
    resume_empty,
    resume_unsplit,
    save_half_way,
    save_unsplit,
    state_of,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from dualpipe_ext.adapters import empty_parameters
from dualpipe_ext.testing import run_ranks

RUNS = {name: Run(name) for name in OPTIMIZERS} | {
    "scaled": Run(scaled=True),
    "frozen": Run(is_frozen=True),
    "dualpipev": Run(schedule="dualpipev"),
}


def saved_on_4(folder: Path, run: Run) -> list[Half]:
    halves: list[Half] = run_ranks(save_half_way, 4, args=(folder, run))
    return halves


def loaded(size: int, folder: Path, run: Run) -> list[Half]:
    if size == 1:
        return [resume_unsplit(folder, run)]
    halves: list[Half] = run_ranks(resume, size, args=(folder, run))
    return halves


OTHER_SIZES = {
    "adamw": (1, 2, 8),
    "sgd": (1,),
    "two groups": (1, 2),
    "frozen": (1, 2),
    "dualpipev": (1, 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_goes_on(name: str, tmp_path: Path) -> None:
    """Bit for bit on as many ranks; on others from the same bits, and then to rounding."""
    run = RUNS[name]
    saved = saved_on_4(tmp_path, run)
    for rank, resumed in enumerate(loaded(4, tmp_path, run)):
        assert resumed.extra == {"place": 3}
        check_same(resumed.before, saved[rank].before)
        check_same(resumed.after, saved[rank].after)
        assert resumed.numbers() == saved[rank].numbers()
    before = joined([half.before for half in saved])
    after = joined([half.after for half in saved])
    for size in OTHER_SIZES.get(name, ()):
        halves = loaded(size, tmp_path, run)
        check_same(joined([half.before for half in halves]), before)
        check_close(joined([half.after for half in halves]), after)
        for half in halves:
            assert half.numbers() == pytest.approx(saved[0].numbers(), rel=1e-5)


def test_a_run_begins_in_one_piece(tmp_path: Path) -> None:
    run = RUNS["two groups"]
    saved = save_unsplit(tmp_path, run)
    halves = run_ranks(resume, 4, args=(tmp_path, run))
    check_same(joined([half.before for half in halves]), saved)
    for outcome in outcomes(resume_another, 4, args=(tmp_path,)):
        assert outcome.is_a("ValueError") and "of another architecture (GPT; " in outcome.text
        assert "the model lacks blocks.2.mark, blocks.4.norm1.weight" in outcome.text


def test_torch_itself_reads_it(tmp_path: Path) -> None:
    """With the functions of torch.distributed.checkpoint and nothing of this package."""
    saved = saved_on_4(tmp_path, RUNS["adamw"])
    model = make_model(other=True)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    with pytest.warns(UserWarning, match="single process"):
        load(state, checkpoint_id=tmp_path / "step-00000003")
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    check_same(state_of(model, optimizer), joined([half.before for half in saved]))
    assert torch.equal(model.get_parameter("head.weight"), model.get_parameter("token.weight"))


def test_a_model_without_values_is_given_them(tmp_path: Path) -> None:
    """Built on the meta device: a rank never has more than its stages."""
    run = RUNS["sgd"]
    saved = saved_on_4(tmp_path, run)
    with empty_parameters():
        empty = make_model()
    for rank, resumed in enumerate(run_ranks(resume_empty, 4, args=(tmp_path, run, empty))):
        check_same(resumed.before, saved[rank].before)
        check_same(resumed.after, saved[rank].after)
    for outcome in outcomes(resume_empty, 2, args=(tmp_path, run, empty, None)):
        assert outcome.is_a("ValueError", "PipelineError")
        assert "give TrainingWrapper the device" in outcome.text
