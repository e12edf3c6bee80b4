"""Means of buffers over replicas, and over the copies of a stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from buffers import KINDS, Buffers, over_replicas
from torch import Tensor

from dualpipe_ext import DualPipe, DualPipeConfig
from dualpipe_ext.checkpoint import save_checkpoint
from dualpipe_ext.testing import run_ranks


def over_mirrors(rank: int, num_ranks: int) -> list[Tensor]:
    pipeline = DualPipe([Buffers(rank), Buffers(rank)])
    for stage in pipeline.module:
        stage.load_state_dict(Buffers(rank).state_dict())
    pipeline.sync_buffers()
    return list(pipeline.module[0].buffers())


def refused_save(rank: int, num_ranks: int, folder: Path) -> list[Tensor]:
    pipeline = DualPipe([Buffers(rank), Buffers(rank)], config=DualPipeConfig(mirror_init="none"))
    with pytest.raises(ValueError, match="step=-1"):
        save_checkpoint(folder, pipeline, step=-1)
    return list(pipeline.module[0].buffers())


def check(found: list[list[Tensor]]) -> None:
    own = [list(Buffers(rank).buffers()) for rank in range(2)]
    for rank, buffers in enumerate(found):
        for kind, buffer, mine, first, second in zip(KINDS, buffers, own[rank], *own, strict=True):
            has_mean = kind.is_floating_point or kind.is_complex
            assert torch.equal(buffer, (first + second) / 2 if has_mean else mine)


def test_replicas_have_the_mean_of_what_has_one() -> None:
    check(run_ranks(over_replicas, 2, "processes", timeout=60.0))


def test_a_save_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    found = run_ranks(refused_save, 2, args=(tmp_path,), timeout=60.0)
    for rank, buffers in enumerate(found):
        for buffer, own in zip(buffers, Buffers(rank).buffers(), strict=True):
            assert torch.equal(buffer, own)


def test_mirrors_have_the_mean_of_what_has_one() -> None:
    check(run_ranks(over_mirrors, 2, timeout=60.0))
