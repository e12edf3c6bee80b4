"""What an engine's messages travel over: chosen once, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dualpipe_ext import _C
from dualpipe_ext._advice import warn_caller
from dualpipe_ext._cuda import num_queues, require_cuda, shared_queues
from dualpipe_ext.config import DualPipeConfig

__all__ = ["EngineSettings", "GpuSettings", "gpu_settings", "on_gpu"]


@dataclass(frozen=True)
class GpuSettings:
    """Messages in device memory.

    Attributes:
        ways: all that this rank sends and receives by.
        device: the index of its GPU.
        by_copies: by copy engines, not over NCCL.
        queues_are_shared: whether streams of this process share hardware queues.
        max_ctas: thread blocks that a message over NCCL may take; 0: as NCCL likes.
        dynamic_shapes: whether each message is described to its receiver.
    """

    ways: Sequence[_C.MessageWay]
    device: int
    by_copies: bool
    queues_are_shared: bool
    max_ctas: int
    dynamic_shapes: bool


@dataclass(frozen=True)
class EngineSettings:
    """What a group needs to make an engine.

    Attributes:
        peers: the ranks that this one exchanges messages with.
        timeout: seconds that a rank may wait for one message.
        gpu: ``None``: messages travel in host memory.
    """

    peers: Sequence[int]
    timeout: float
    gpu: GpuSettings | None = None


def on_gpu(config: DualPipeConfig) -> bool:
    """Whether messages are to stay in device memory."""
    return config.transport != "host"


def gpu_settings(
    config: DualPipeConfig,
    device: torch.device,
    ways: Sequence[_C.MessageWay],
    num_ways_of_others: Sequence[int] = (),
) -> GpuSettings | None:
    """The settings for messages on the GPU, where the configuration asks for them.

    Args:
        config: the pipeline's.
        device: that of the stages.
        ways: all that the rank sends and receives by.
        num_ways_of_others: those of each other rank that shares this process and its hardware
            queues: all of them must decide alike.

    Raises:
        ValueError: it does, and the stages are elsewhere.
    """
    if not on_gpu(config):
        return None
    require_cuda(config.transport)
    if device.type != "cuda":
        raise ValueError(
            f"transport={config.transport!r} is for stages on a GPU, and these are on "
            f"{str(device)!r}; move them there before the pipeline is made, or choose "
            f"transport='host'"
        )
    # Beside those of its messages, a rank has a stream that computes and one that sums; a
    # communicator has two of NCCL's own, which wait for its messages.
    streams_per_way = 3 if config.transport == "nccl" else 1
    num_ways = [len(ways), *num_ways_of_others]
    num_streams = sum(streams_per_way * count + 2 for count in num_ways)
    queues_are_shared = num_streams > num_queues()
    if queues_are_shared and num_ways_of_others and config.transport == "nccl":
        warn_caller(
            f"{len(num_ways)} ranks that are threads have {num_streams} streams over NCCL, which "
            f"share {num_queues()} hardware queues: their messages may wait for each other until "
            f"the time limit; start a process for each rank, or choose transport='copy'"
        )
    elif (problem := shared_queues(num_streams)) is not None:
        warn_caller(problem)
    index = torch.cuda.current_device() if device.index is None else device.index
    by_copies = config.transport == "copy"
    return GpuSettings(
        ways=ways,
        device=index,
        by_copies=by_copies,
        queues_are_shared=queues_are_shared,
        max_ctas=config.nccl_max_ctas,
        dynamic_shapes=config.dynamic_shapes,
    )
