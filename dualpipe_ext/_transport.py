"""What an engine's messages travel over: chosen once, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dualpipe_ext import _C
from dualpipe_ext._advice import warn_caller
from dualpipe_ext._cuda import require_nccl, shared_queues
from dualpipe_ext.config import DualPipeConfig

__all__ = ["EngineSettings", "GpuSettings", "gpu_settings"]

Way = tuple[int, _C.MessageKind, bool]  # peer, kind, outgoing


@dataclass(frozen=True)
class GpuSettings:
    """Messages in device memory, over NCCL."""

    ways: Sequence[Way]
    device: int
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


def gpu_settings(
    config: DualPipeConfig, device: torch.device, ways: Sequence[Way]
) -> GpuSettings | None:
    """The settings for messages on the GPU, where the configuration asks for them.

    Raises:
        ValueError: it does, and the stages are elsewhere.
    """
    if config.transport == "host":
        return None
    require_nccl()
    if device.type != "cuda":
        raise ValueError(
            f"transport='nccl' is for stages on a GPU, and these are on {str(device)!r}; move them "
            f"there before the pipeline is made, or choose transport='host'"
        )
    problem = shared_queues(len(ways) + 1)
    if problem is not None:
        warn_caller(problem)
    index = torch.cuda.current_device() if device.index is None else device.index
    return GpuSettings(ways, index, config.nccl_max_ctas, config.dynamic_shapes)
