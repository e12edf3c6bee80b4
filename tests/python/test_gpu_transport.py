"""What is decided about messages on GPUs before one is needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualpipe_ext import _C, DualPipe, DualPipeConfig, _cuda
from dualpipe_ext._cuda import check_device_queues, shapes_digest
from dualpipe_ext._transport import gpu_settings
from dualpipe_ext.testing import run_ranks

CUDA = torch.device("cuda", 3)


def make_on_cpu(rank: int, num_ranks: int) -> str:
    """What a pipeline over NCCL says to stages on the CPU."""
    with pytest.raises(ValueError) as caught:
        DualPipe([nn.Linear(2, 2) for _ in range(2)], config=DualPipeConfig(transport="nccl"))
    return str(caught.value)


def test_stages_on_the_cpu_are_refused_on_every_rank() -> None:
    for text in run_ranks(make_on_cpu, 2):
        assert "transport='nccl' is for stages on a GPU, and these are on 'cpu'" in text


def test_the_host_is_asked_nothing() -> None:
    assert gpu_settings(DualPipeConfig(), CUDA, []) is None


def test_settings_follow_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    config = DualPipeConfig(transport="nccl", nccl_max_ctas=4, dynamic_shapes=True)
    settings = gpu_settings(config, CUDA, [])
    assert settings is not None
    assert (settings.device, settings.max_ctas, settings.dynamic_shapes) == (3, 4, True)


def test_device_queues_are_set_while_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    problem = check_device_queues(9)
    assert problem is not None and "set CUDA_DEVICE_MAX_CONNECTIONS=32" in problem
    assert check_device_queues(8) is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert check_device_queues(9) is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert check_device_queues(9) is None  # it was set


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


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_C, "nccl_engine", raising=False)
    with pytest.raises(ValueError, match="built without; python -m dualpipe_ext info shows"):
        _cuda.nccl_engine()


@pytest.mark.parametrize(
    ("name", "value"), [("transport", "tcp"), ("nccl_max_ctas", -1), ("nccl_max_ctas", True)]
)
def test_bad_settings_are_errors(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        DualPipeConfig(**{name: value})  # type: ignore[arg-type]
