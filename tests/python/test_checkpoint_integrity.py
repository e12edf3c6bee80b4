"""A checkpoint with other bytes than were written is never loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cut_off_saves import load, save
from outcomes import outcomes
from torch import nn

from dualpipe_ext.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dualpipe_ext.checkpoint.folders import read_manifest
from dualpipe_ext.checkpoint.integrity import checksums_of
from dualpipe_ext.checkpoint.saved import Saved
from dualpipe_ext.checkpoint.storage import Record, records
from dualpipe_ext.testing import run_ranks

WIDTH = 24


def make_model(value: float) -> nn.Linear:
    model = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        model.weight.copy_(torch.arange(WIDTH * WIDTH).view(WIDTH, WIDTH) + value)
        model.bias.fill_(value)
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "run", make_model(0.5), step=1000, extra={"place": 3})


@contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """One bit of a file is another one."""
    written = file.read_bytes()
    changed = bytearray(written)
    changed[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(changed)
    try:
        yield
    finally:
        file.write_bytes(written)


def some_bits(file: Path, number: int) -> list[int]:
    return random.Random(0).sample(range(8 * file.stat().st_size), number)


def has_loaded(checkpoint: Path) -> bool:
    """The values that were saved, and all else; the model is as it was where that is refused."""
    model = make_model(-1.0)
    state = torch.random.get_rng_state()
    try:
        resumed = load_checkpoint(checkpoint, model)
    except ValueError as error:
        assert f"{checkpoint} is damaged: " in str(error)
        assert "load an older checkpoint" in str(error)
        assert torch.equal(torch.random.get_rng_state(), state)
        expected = make_model(-1.0)
    else:
        assert (resumed.step, resumed.extra) == (1000, {"place": 3})
        expected = make_model(0.5)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    return bool(expected.bias[0] == 0.5)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checksums.json"])
def test_any_bit(checkpoint: Path, name: str) -> None:
    """Of values, headers and pickles, those of random numbers among them."""
    file = checkpoint / name
    for bit in some_bits(file, 100):
        with flipped(file, bit):
            assert not has_loaded(checkpoint), bit
    assert has_loaded(checkpoint)


def test_bits_of_a_value(checkpoint: Path) -> None:
    saved = Saved.at(checkpoint)
    assert saved.checksums is not None
    (record,) = records(saved.metadata, ["model.bias"])
    name, start, size = record
    saved.checksums.check(checkpoint, [record])
    for bit in random.Random(0).sample(range(8 * start, 8 * (start + size)), 200):
        with (
            flipped(checkpoint / name, bit),
            pytest.raises(ValueError, match=f"is damaged: {name} has other bytes"),
        ):
            saved.checksums.check(checkpoint, [record])


def test_bits_of_the_manifest(checkpoint: Path) -> None:
    """What it says is what was written, or it is refused."""
    file = checkpoint / "checkpoint.json"
    written = read_manifest(checkpoint)
    num_refused = 0
    for bit in some_bits(file, 500):
        with flipped(file, bit):
            try:
                assert read_manifest(checkpoint) == written  # white space
            except ValueError as error:
                assert "is damaged: " in str(error) or "use the version that wrote it" in str(error)
                num_refused += 1
    assert num_refused > 400


def test_a_checkpoint_of_a_later_version(checkpoint: Path) -> None:
    (checkpoint / "checkpoint.json").write_text('{"format": 3}')
    with pytest.raises(ValueError, match=r"has format 3, .* up to 2; use the version"):
        load_checkpoint(checkpoint, make_model(-1.0))


def test_a_damaged_manifest_does_not_stop_a_run(checkpoint: Path) -> None:
    """It is left as it is; which checkpoint is the last one is asked of somebody."""
    (checkpoint / "checkpoint.json").write_text("{}")
    save_checkpoint(checkpoint.parent, make_model(0.5), step=2000, keep=1)
    save_checkpoint(checkpoint.parent, make_model(0.5), step=3000, keep=1)
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["step-00001000", "step-00003000"]
    with pytest.raises(ValueError, match=r"step-00001000 is damaged: checkpoint.json"):
        latest_checkpoint(checkpoint.parent)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "__1_0.distcp has"),
        (lambda file: file.unlink(), "__1_0.distcp is missing"),
        (
            lambda file: file.write_bytes(file.read_bytes()[::-1]),
            "__1_0.distcp has other bytes than were written",
        ),
    ],
    ids=["shorter", "missing", "other"],
)
def test_every_rank_is_told(tmp_path: Path, damage: Callable[[Path], None], text: str) -> None:
    run_ranks(save, 2, args=(tmp_path, [1], {}))
    damage(tmp_path / "step-00000001" / "__1_0.distcp")
    for outcome in outcomes(load, 2, args=(tmp_path,)):
        assert outcome.error in ("ValueError", "PipelineError")
        assert f"is damaged: {text}" in outcome.text
        assert "load an older checkpoint" in outcome.text


def test_a_rank_that_does_not_see_a_file(tmp_path: Path) -> None:
    """Another one does: the file systems of two machines."""
    run_ranks(save, 2, args=(tmp_path, [1], {}))
    place = tmp_path / "step-00000001"
    saved = Saved.at(place)
    assert saved.checksums is not None
    (place / "__1_0.distcp").unlink()
    with pytest.raises(
        ValueError, match=r"cannot be read on this rank .*__1_0.distcp.*all ranks share"
    ):
        saved.checksums.check(place, [("__1_0.distcp", 0, 1)])


def test_a_rank_that_cannot_read_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_on_rank_1(folder: Path, own: list[Record]) -> dict[Record, int]:
        if own[0][0] == "__1_0.distcp":
            raise OSError(5, "Input/output error")
        return checksums_of(folder, own)

    monkeypatch.setattr("dualpipe_ext.checkpoint.save.checksums_of", fails_on_rank_1)
    first, second = outcomes(save, 2, args=(tmp_path, [1], {}))
    assert first.error == "PipelineError" and "rank 1 could not save" in first.text
    assert second.error == "OSError" and "Input/output error" in second.text
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_the_first_format(checkpoint: Path) -> None:
    """It has no checksums."""
    (checkpoint / "checksums.json").unlink()
    manifest = read_manifest(checkpoint)
    del manifest["checksums"], manifest["files"]["checksums.json"]
    (checkpoint / "checkpoint.json").write_text(json.dumps({**manifest, "format": 1}))
    assert has_loaded(checkpoint)
