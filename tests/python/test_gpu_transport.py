"""What is decided about messages on GPUs before one is needed."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dualpipe_ext.pipeline as pipeline_module
from dualpipe_ext import _C, DualPipe, DualPipeConfig, Pipeline, _cuda, _local_stages, _transport
from dualpipe_ext._cuda import shapes_digest, shared_queues
from dualpipe_ext._transport import (
    EngineSettings,
    Offer,
    choose_transport,
    gpu_settings,
    offered_transport,
)
from dualpipe_ext.config import Transport
from dualpipe_ext.groups import LoopbackGroup
from dualpipe_ext.testing import run_ranks

CUDA = torch.device("cuda", 3)
ON_CPU = Offer(transport="auto", gpu="", is_anywhere=False, problem="")


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one."""
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("NCCL_HOSTID", "node1")


def other(offer: Offer) -> Offer:
    """The same of another node's GPU."""
    return {**offer, "gpu": offer["gpu"].replace("node1", "node2")}


@pytest.mark.parametrize("transport", ["nccl", "copy"])
def test_stages_on_the_cpu_are_refused(transport: Any, with_cuda: None) -> None:
    config = DualPipeConfig(transport=transport)
    with pytest.raises(ValueError, match="for stages on a GPU, and these are on 'cpu'"):
        offered_transport(config, torch.device("cpu"), threads=False)


def test_a_rank_on_the_cpu_offers_no_gpu(with_cuda: None, gpu: None) -> None:
    offer = offered_transport(DualPipeConfig(), torch.device("cpu"), threads=False)
    assert offer == ON_CPU
    assert choose_transport([offer, offer]) == ("host", "")


def test_ranks_with_a_gpu_each_choose_nccl(with_cuda: None, gpu: None) -> None:
    offer = offered_transport(DualPipeConfig(), CUDA, threads=False)
    assert offer == {**ON_CPU, "gpu": "node1 0000:3b:00"}
    assert choose_transport([offer, other(offer)]) == ("nccl", "")
    assert choose_transport([offer]) == ("host", "")  # there is nobody to send to


def test_what_keeps_ranks_from_nccl_is_told(with_cuda: None, gpu: None) -> None:
    offer = offered_transport(DualPipeConfig(), CUDA, threads=False)
    _, reason = choose_transport([offer, other(offer), ON_CPU])
    assert reason == "rank 2 has its stages on the CPU"
    transport, reason = choose_transport([offer, other(offer), offer])
    assert transport == "host" and "ranks 0 and 2 share a GPU" in reason


def test_hosts_of_one_name_are_told_apart_by_their_boot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_transport, "BOOT_ID", tmp_path / "boot_id")
    before = _transport._name_of_host()
    (tmp_path / "boot_id").write_text("b007\n")
    assert _transport._name_of_host() == f"{before} b007"


def test_a_device_that_cannot_be_asked_is_a_reason(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a forked process. Without tensors on a GPU it is none."""

    def cannot(device: torch.device) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "get_device_properties", cannot)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty, filled = (
        offered_transport(DualPipeConfig(), device, threads=False) for device in (None, CUDA)
    )
    assert choose_transport([ON_CPU, empty]) == ("host", "")
    transport, reason = choose_transport([filled, empty])
    assert transport == "host" and "on rank 0, Cannot re-initialize" in reason


def test_threads_use_the_host(with_cuda: None, gpu: None) -> None:
    offer = offered_transport(DualPipeConfig(), CUDA, threads=True)
    assert choose_transport([offer, other(offer)]) == ("host", "")


def test_stages_without_tensors_are_where_the_others_are(with_cuda: None, gpu: None) -> None:
    empty = offered_transport(DualPipeConfig(), None, threads=False)
    filled = offered_transport(DualPipeConfig(), CUDA, threads=False)
    assert choose_transport([empty, other(filled)]) == ("nccl", "")
    assert choose_transport([empty, other(empty)]) == ("host", "")
    assert choose_transport([empty, ON_CPU]) == ("host", "")
    asked = offered_transport(DualPipeConfig(transport="copy"), None, threads=False)
    assert choose_transport([asked, asked]) == ("copy", "")


def test_a_gpu_that_a_build_without_cuda_cannot_use(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(_C, "gpu_engine", raising=False)
    offer = offered_transport(DualPipeConfig(), CUDA, threads=False)
    transport, reason = choose_transport([offer, other(offer)])
    assert transport == "host" and "on rank 0" in reason and "built without" in reason


@pytest.mark.parametrize(
    ("variable", "value"), [("CUDA_LAUNCH_BLOCKING", "1"), ("NCCL_COMM_BLOCKING", "0")]
)
def test_variables_under_which_messages_would_hang_are_refused(
    with_cuda: None, gpu: None, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}={value}.* unset it"):
        offered_transport(DualPipeConfig(transport="nccl"), CUDA, threads=False)
    offer = offered_transport(DualPipeConfig(), CUDA, threads=False)
    transport, reason = choose_transport([offer, other(offer)])
    assert transport == "host" and variable in reason


def test_a_process_with_two_nccls_uses_the_host(
    with_cuda: None, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require_one() -> None:
        raise ValueError("two NCCLs")

    monkeypatch.setattr(_C, "require_one_nccl", require_one, raising=False)
    offer = offered_transport(DualPipeConfig(), CUDA, threads=False)
    assert choose_transport([offer, other(offer)]) == ("host", "on rank 0, two NCCLs")
    with pytest.raises(ValueError, match="two NCCLs"):
        offered_transport(DualPipeConfig(transport="nccl"), CUDA, threads=False)


def make_without_tensors(rank: int, num_ranks: int) -> str:
    """What a pipeline whose second stage has no tensor says of its transport."""
    pipeline = Pipeline([nn.Tanh() if rank else nn.Linear(2, 2)], "1f1b")
    assert pipeline._planner.lookahead == 0
    return pipeline.transport


def test_a_pipeline_takes_what_was_chosen(with_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine is the host's, as there is no GPU, but is to be made as one over NCCL."""
    made: dict[int, EngineSettings] = {}
    make_engine = LoopbackGroup.make_engine

    def note(group: LoopbackGroup, settings: EngineSettings) -> _C.Engine:
        made[group.rank] = settings
        return make_engine(group, replace(settings, gpu=None))

    def offer(config: Any, device: torch.device | None, *, threads: bool) -> Offer:
        return {**ON_CPU, "gpu": f"GPU of {device}", "is_anywhere": device is None}

    monkeypatch.setattr(LoopbackGroup, "make_engine", note)
    monkeypatch.setattr(_local_stages, "offered_transport", offer)
    monkeypatch.setattr(pipeline_module, "clock_by_gpu", lambda engine, device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setenv(_cuda.QUEUES, "32")
    assert run_ranks(make_without_tensors, 2) == ["nccl", "nccl"]
    for rank in range(2):
        gpu = made[rank].gpu
        assert gpu is not None and not gpu.by_copies
        assert (gpu.device, len(gpu.ways)) == (3, 2)


def test_the_host_is_asked_nothing() -> None:
    assert gpu_settings("host", DualPipeConfig(), CUDA, []) is None


def test_settings_follow_the_configuration(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    config = DualPipeConfig(nccl_max_ctas=4, dynamic_shapes=True)
    settings = gpu_settings("nccl", config, CUDA, [])
    assert settings is not None
    assert (settings.device, settings.max_ctas, settings.dynamic_shapes) == (3, 4, True)
    assert not settings.by_copies
    by_copies = gpu_settings("copy", config, CUDA, [])
    assert by_copies is not None and by_copies.by_copies and by_copies.reductions_may_wait
    monkeypatch.setenv(_cuda.QUEUES, "1")
    with pytest.warns(UserWarning, match="2 streams share 1 hardware queues"):
        shared = gpu_settings("copy", config, CUDA, [])
    assert shared is not None and not shared.reductions_may_wait


@pytest.mark.parametrize(("transport", "num_streams"), [("copy", 12 + 3), ("nccl", 2 * 12 + 3)])
def test_sums_wait_within_a_step_where_there_are_queues(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch, transport: Transport, num_streams: int
) -> None:
    ways = _C.mirror_ways(0, 4) * 3
    found = []
    for count in (num_streams - 1, num_streams):
        monkeypatch.setenv(_cuda.QUEUES, str(count))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few queues, which another test is about
            settings = gpu_settings(transport, DualPipeConfig(), CUDA, ways)
        assert settings is not None
        found.append(settings.reductions_may_wait)
    assert found == [False, True]


def test_threads_whose_streams_share_hardware_queues(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_cuda.QUEUES, "32")
    ways = _C.mirror_ways(0, 4) * 3
    config = DualPipeConfig()
    few, many = (gpu_settings("copy", config, CUDA, ways, others) for others in ([12], [12, 3]))
    assert few is not None and not few.queues_are_shared
    assert not few.reductions_may_wait  # for the other rank's computation
    assert many is not None and many.queues_are_shared
    with pytest.warns(UserWarning, match=r"3 ranks that are threads have 114 streams over NCCL"):
        gpu_settings("nccl", config, CUDA, ways, [12, 12])


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
