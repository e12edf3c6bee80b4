"""What is decided about messages on GPUs before one is needed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from dualpipe_ext import _C, DualPipe, DualPipeConfig, _cuda
from dualpipe_ext._cuda import shapes_digest, shared_queues
from dualpipe_ext._transport import gpu_settings
from dualpipe_ext.testing import run_ranks

CUDA = torch.device("cuda", 3)


def make_without_cuda(rank: int, num_ranks: int, transport: Any) -> str:
    """What a pipeline on GPUs says in a build without CUDA."""
    with pytest.raises(ValueError) as caught:
        DualPipe([nn.Linear(2, 2) for _ in range(2)], config=DualPipeConfig(transport=transport))
    return str(caught.value)


@pytest.mark.parametrize("transport", ["nccl", "copy"])
def test_a_build_without_cuda_says_so_on_every_rank(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(_C, "gpu_engine", raising=False)
    for text in run_ranks(make_without_cuda, 2, args=(transport,)):
        assert f"transport={transport!r} needs the extension with CUDA" in text
        assert "built without; python -m dualpipe_ext info shows" in text


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this build had CUDA, whatever it has."""
    monkeypatch.setattr(_C, "gpu_engine", None, raising=False)
    monkeypatch.setattr(_C, "require_one_nccl", lambda: None, raising=False)


@pytest.mark.parametrize("transport", ["nccl", "copy"])
def test_stages_on_the_cpu_are_refused(transport: Any, with_cuda: None) -> None:
    config = DualPipeConfig(transport=transport)
    with pytest.raises(ValueError, match="for stages on a GPU, and these are on 'cpu'"):
        gpu_settings(config, torch.device("cpu"), [])


def test_the_host_is_asked_nothing() -> None:
    assert gpu_settings(DualPipeConfig(), CUDA, []) is None


def test_settings_follow_the_configuration(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    config = DualPipeConfig(transport="nccl", nccl_max_ctas=4, dynamic_shapes=True)
    settings = gpu_settings(config, CUDA, [])
    assert settings is not None
    assert (settings.device, settings.max_ctas, settings.dynamic_shapes) == (3, 4, True)
    assert not settings.by_copies
    by_copies = gpu_settings(DualPipeConfig(transport="copy"), CUDA, [])
    assert by_copies is not None and by_copies.by_copies


def test_threads_whose_streams_share_hardware_queues(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_cuda.QUEUES, "32")
    ways = _C.mirror_ways(0, 4) * 3
    copies = DualPipeConfig(transport="copy")
    few, many = (gpu_settings(copies, CUDA, ways, others) for others in ([12], [12, 3]))
    assert few is not None and not few.queues_are_shared
    assert many is not None and many.queues_are_shared
    with pytest.warns(UserWarning, match=r"3 ranks that are threads have 114 streams over NCCL"):
        gpu_settings(DualPipeConfig(transport="nccl"), CUDA, ways, [12, 12])


@pytest.mark.parametrize("chosen", [None, "1"])
@pytest.mark.parametrize("has_started", [False, True])
def test_queues_are_asked_for_while_the_driver_listens(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, has_started: bool
) -> None:
    monkeypatch.setattr(_cuda, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: has_started)
    monkeypatch.delenv(_cuda.QUEUES, raising=False)
    if chosen is not None:
        monkeypatch.setenv(_cuda.QUEUES, chosen)
    _cuda.reserve_queues()
    assert os.environ.get(_cuda.QUEUES) == (chosen or (None if has_started else "32"))


@pytest.mark.parametrize(("queues", "num_streams"), [("", 9), ("8", 9), ("16", 40)])
def test_shared_queues_are_told(
    queues: str, num_streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", queues)
    problem = shared_queues(num_streams)
    assert problem is not None and "set CUDA_DEVICE_MAX_CONNECTIONS=32" in problem
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    assert shared_queues(num_streams) is None


def test_shapes_are_told_apart() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(3, 2)
    known = [
        shapes_digest(0, [[x], [x]]),
        shapes_digest(1, [[x], [x]]),
        shapes_digest(0, [[x], [y]]),
        shapes_digest(0, [[x], [x.double()]]),
        shapes_digest(0, [[x], [None]]),
        shapes_digest(0, [[x]]),
    ]
    assert len(set(known)) == len(known) and 0 not in known
    assert shapes_digest(0, [[x], [x]]) == shapes_digest(0, [[x + 1], [x]])
    assert shapes_digest(2, []) == 0


@pytest.mark.parametrize(
    ("name", "value"), [("transport", "tcp"), ("nccl_max_ctas", -1), ("nccl_max_ctas", True)]
)
def test_bad_settings_are_errors(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        DualPipeConfig(**{name: value})  # type: ignore[arg-type]
