"""What an engine's messages travel over: chosen once, the same on all ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from dualpipe_ext import _C
from dualpipe_ext._advice import warn_caller
from dualpipe_ext._cuda import num_queues, require_cuda, require_environment, shared_queues
from dualpipe_ext.config import DualPipeConfig, Transport

__all__ = [
    "EngineSettings",
    "GpuSettings",
    "Offer",
    "choose_transport",
    "gpu_settings",
    "offered_transport",
]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # as several hosts may have the same name


@dataclass(frozen=True)
class GpuSettings:
    """Settings for messages in device memory.

    Attributes:
        ways: all ways by which this rank sends and receives.
        device: the index of its GPU.
        by_copies: whether messages travel by copy engines rather than over NCCL.
        queues_are_shared: whether streams of this process share hardware queues.
        reductions_may_wait: whether sums of gradients may wait for other ranks within a step, as
            their streams share no queue with computation.
        max_ctas: the most thread blocks that a message over NCCL may take; 0: NCCL decides.
        dynamic_shapes: whether each message is described to its receiver.
    """

    ways: Sequence[_C.MessageWay]
    device: int
    by_copies: bool
    queues_are_shared: bool
    reductions_may_wait: bool
    max_ctas: int
    dynamic_shapes: bool


@dataclass(frozen=True)
class EngineSettings:
    """What a group needs to make an engine.

    Attributes:
        peers: the ranks that this one exchanges messages with.
        timeout: seconds that a rank may wait for one message.
        gpu: settings for messages on the GPU; ``None``: messages travel in host memory.
    """

    peers: Sequence[int]
    timeout: float
    gpu: GpuSettings | None = None


class Offer(TypedDict):
    """What the messages of one rank could travel over, as it tells the others.

    Attributes:
        transport: the configured one.
        gpu: the GPU that ``"auto"`` might send from: its host, as NCCL tells hosts apart, and its
            PCI address; empty if there is none.
        is_anywhere: whether stages have no tensors, so that they are wherever their inputs are.
        problem: why NCCL cannot be used on that GPU; empty if it can.
    """

    transport: Transport
    gpu: str
    is_anywhere: bool
    problem: str


def offered_transport(
    config: DualPipeConfig, device: torch.device | None, *, threads: bool
) -> Offer:
    """Returns the offer of this rank.

    Args:
        config: the configuration of the pipeline.
        device: the device of the stages; ``None`` if they have no tensors.
        threads: whether ranks share this process.

    Raises:
        ValueError: the configured transport cannot be used here.
    """
    offer = Offer(transport=config.transport, gpu="", is_anywhere=device is None, problem="")
    if config.transport in ("nccl", "copy"):
        require_cuda(config.transport)
        require_environment(config.transport)
        if device is not None and device.type != "cuda":
            raise ValueError(
                f"transport={config.transport!r} is for stages on a GPU, and these are on "
                f"{str(device)!r}; move them there before the pipeline is made, or choose "
                f"transport='host'"
            )
    elif config.transport == "auto" and not threads and _has_gpu(device):
        try:
            require_cuda("nccl")
            require_environment("nccl")
            offer["gpu"] = _name_of_gpu(device or torch.device("cuda"))
        except (ValueError, RuntimeError) as error:
            offer["problem"] = str(error)
    return offer


def choose_transport(offers: Sequence[Offer]) -> tuple[Transport, str]:
    """Returns what all messages travel over, and why they do not go from GPU to GPU if they might.

    Args:
        offers: the offer of each rank, all for the same configured transport.
    """
    wanted = offers[0]["transport"]
    if wanted != "auto":
        return wanted, ""
    gpus = [offer["gpu"] for offer in offers]
    is_any_on_gpu = any((o["gpu"] or o["problem"]) and not o["is_anywhere"] for o in offers)
    if not is_any_on_gpu or len(gpus) == 1:
        return "host", ""
    for rank, offer in enumerate(offers):
        if offer["problem"]:
            return "host", f"on rank {rank}, {offer['problem']}"
        if not offer["gpu"]:
            return "host", f"rank {rank} has its stages on the CPU"
        if (first := gpus.index(offer["gpu"])) < rank:
            return "host", f"ranks {first} and {rank} share a GPU, which not every NCCL can do"
    return "nccl", ""


def _has_gpu(device: torch.device | None) -> bool:
    return torch.cuda.is_available() if device is None else device.type == "cuda"


def _name_of_gpu(device: torch.device) -> str:
    gpu: Any = torch.cuda.get_device_properties(device)
    place = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}"
    return f"{os.environ.get('NCCL_HOSTID') or _name_of_host()} {place}"


def _name_of_host() -> str:
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot}".strip()


def gpu_settings(
    transport: Transport,
    config: DualPipeConfig,
    device: torch.device,
    ways: Sequence[_C.MessageWay],
    num_ways_of_others: Sequence[int] = (),
) -> GpuSettings | None:
    """Returns the settings for messages on the GPU; ``None`` if they travel in host memory.

    Args:
        transport: the transport that was chosen.
        config: the configuration of the pipeline.
        device: the device of the stages.
        ways: all ways by which the rank sends and receives.
        num_ways_of_others: the number of ways of each other rank that shares this process and its
            hardware queues; all of them must decide alike.
    """
    if transport == "host":
        return None
    # Besides those of its messages, a rank has one stream that computes and two that sum (one, if
    # sums may not wait). Each communicator has two streams of NCCL's own, which wait for its
    # messages and have the default priority, like those of computation and sums. Streams of
    # messages have another priority; that they share no queue with the others is assumed only if
    # there are enough queues for either kind.
    num_beside = max(len(ways), 2 * len(ways) * (transport == "nccl"))
    reductions_may_wait = not num_ways_of_others and num_beside + 3 <= num_queues()
    num_others = 3 if reductions_may_wait else 2
    streams_per_way = 3 if transport == "nccl" else 1
    num_ways = [len(ways), *num_ways_of_others]
    num_streams = sum(streams_per_way * count + num_others for count in num_ways)
    queues_are_shared = num_streams > num_queues()
    if queues_are_shared and num_ways_of_others and transport == "nccl":
        warn_caller(
            f"{len(num_ways)} ranks that are threads have {num_streams} streams over NCCL, which "
            f"share {num_queues()} hardware queues: their messages may wait for each other until "
            f"the time limit; start a process for each rank, or choose transport='copy'"
        )
    elif (problem := shared_queues(num_streams)) is not None:
        warn_caller(problem)
    index = torch.cuda.current_device() if device.index is None else device.index
    return GpuSettings(
        ways=ways,
        device=index,
        by_copies=transport == "copy",
        queues_are_shared=queues_are_shared,
        reductions_may_wait=reductions_may_wait,
        max_ctas=config.nccl_max_ctas,
        dynamic_shapes=config.dynamic_shapes,
    )
