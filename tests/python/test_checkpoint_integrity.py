"""A checkpoint with other bytes than were written is never loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cut_off_saves import load, save
from outcomes import outcomes
from torch import nn

from dualpipe_ext.checkpoint import load_checkpoint, save_checkpoint
from dualpipe_ext.testing import run_ranks

WIDTH = 24


def make_model(value: float) -> nn.Linear:
    model = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        model.weight.copy_(torch.arange(WIDTH * WIDTH).view(WIDTH, WIDTH) + value)
        model.bias.fill_(value)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run"), make_model(0.5), step=1)


@contextmanager
def flipped(file: Path, place: int) -> Iterator[None]:
    """One bit of a file is another one."""
    written = file.read_bytes()
    changed = bytearray(written)
    changed[place] ^= 1 << (place % 8)
    file.write_bytes(changed)
    try:
        yield
    finally:
        file.write_bytes(written)


def is_refused(checkpoint: Path) -> bool:
    """Whether it is said to be damaged; what is loaded otherwise has to be what was saved."""
    model = make_model(-1.0)
    try:
        load_checkpoint(checkpoint, model)
    except ValueError as error:
        assert "damaged" in str(error) and "load an older checkpoint" in str(error)
        expected = make_model(-1.0)
    else:
        expected = make_model(0.5)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    return bool(expected.bias[0] == -1.0)


def test_a_bit_of_a_value(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    weight = make_model(0.5).weight.detach().numpy().tobytes()
    start = file.read_bytes().index(weight)
    for place in random.Random(0).sample(range(start, start + len(weight)), 20):
        with flipped(file, place):
            assert is_refused(checkpoint), place
    assert not is_refused(checkpoint)


def test_any_bit(checkpoint: Path) -> None:
    """Headers and pickles too. Some bytes fill up space and mean nothing, a sixth of this file."""
    file = checkpoint / "__0_0.distcp"
    size = file.stat().st_size
    num_refused = 0
    for place in random.Random(1).sample(range(size), 100):
        with flipped(file, place):
            num_refused += is_refused(checkpoint)
    assert num_refused > 50


def test_any_bit_of_the_description(checkpoint: Path) -> None:
    file = checkpoint / ".metadata"
    for place in random.Random(2).sample(range(file.stat().st_size), 20):
        with (
            flipped(file, place),
            pytest.raises(ValueError, match=r"is damaged: \.metadata has other bytes"),
        ):
            load_checkpoint(checkpoint, make_model(-1.0))


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    run_ranks(save, 2, args=(tmp_path, [1], {}))
    file = tmp_path / "step-00000001" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    for outcome in outcomes(load, 2, args=(tmp_path,)):
        assert "is damaged: __1_0.distcp has" in outcome.text
        assert "load an older checkpoint" in outcome.text


def test_every_rank_is_told(tmp_path: Path) -> None:
    run_ranks(save, 2, args=(tmp_path, [1], {}))
    file = tmp_path / "step-00000001" / "__1_0.distcp"  # which both ranks read
    with flipped(file, file.read_bytes().index(torch.ones(3).numpy().tobytes())):
        for outcome in outcomes(load, 2, args=(tmp_path,)):
            assert outcome.error in ("ValueError", "PipelineError")
            assert "is damaged: __1_0.distcp has other bytes" in outcome.text


def test_a_checkpoint_of_an_earlier_version(checkpoint: Path) -> None:
    manifest = checkpoint / "checkpoint.json"
    written = manifest.read_text()
    earlier = {key: value for key, value in json.loads(written).items() if key != "crc32"}
    manifest.write_text(json.dumps(earlier))
    try:
        assert not is_refused(checkpoint)
    finally:
        manifest.write_text(written)


def test_records_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint = save_checkpoint(tmp_path, make_model(0.5), step=1)
    finally:
        torch.serialization.set_crc32_options(True)
    assert not is_refused(checkpoint)
