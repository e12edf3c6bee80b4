"""The peers: upstream DualPipe and the schedules of ``torch.distributed.pipelining``.

Upstream needs CUDA in two places, a check of the device and the allocation of receive buffers.
Both are replaced here at run time, so that it runs over gloo; nothing else of it is changed. On a
GPU it runs as it is.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV
from torch.distributed.pipelining.stage import _PipelineStageBase

Criterion = Callable[..., Tensor]


CPU = torch.device("cpu")


def load_upstream(checkout: Path, device: torch.device = CPU) -> ModuleType:
    """Imports upstream's package from a checkout; makes it run on the CPU if that is the device.

    Raises:
        ValueError: the folder is not a checkout of deepseek-ai/DualPipe.
    """
    if not (checkout / "dualpipe" / "dualpipe.py").is_file():
        raise ValueError(
            f"{checkout} has no dualpipe/dualpipe.py: give --peer-dualpipe a checkout of "
            "https://github.com/deepseek-ai/DualPipe"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    import dualpipe  # type: ignore[import-not-found]
    from dualpipe import comm

    def cpu_buffers() -> list[Tensor]:
        return [
            torch.empty(shape, dtype=comm.TENSOR_DTYPE, requires_grad=True)
            for shape in comm.TENSOR_SHAPES
        ]

    if device == CPU:
        comm.build_from_tensor_shapes = cpu_buffers
    package: ModuleType = dualpipe
    return package


def join_with_nccl(folder: str) -> None:
    """Replaces the default group that ``run_ranks`` made by one over gloo and NCCL.

    Upstream's messages use the default group. Several ranks share the GPU (which needs NCCL 2.30
    and ``NCCL_MULTI_RANK_GPU_ENABLE=1``).

    Args:
        folder: an empty folder where the ranks meet, the same for all.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )


def build_upstream(
    upstream: ModuleType, stages: Sequence[nn.Module], message_shape: tuple[int, ...]
) -> Any:
    """Builds upstream's ``DualPipe`` for float32 messages of one shape."""
    upstream.set_p2p_tensor_shapes([message_shape])
    upstream.set_p2p_tensor_dtype(torch.float32)
    if next(stages[0].parameters()).is_cuda:
        return upstream.DualPipe(stages)
    with mock.patch("torch.cuda.current_device", return_value="cpu"):
        return upstream.DualPipe(stages)


def build_torch_dualpipev(
    stages: Sequence[nn.Module],
    rank: int,
    num_ranks: int,
    num_chunks: int,
    criterion: Criterion,
    examples: Sequence[tuple[Tensor, Tensor]],
    dw_builder: Callable[[], Callable[..., None]] | None = None,
) -> ScheduleDualPipeV:
    """Builds torch's DualPipeV for the stages ``rank`` and ``2 * num_ranks - 1 - rank``.

    Args:
        stages: the two modules of this rank.
        rank: this rank.
        num_ranks: the number of ranks.
        num_chunks: the number of micro-batches.
        criterion: the loss of the last stage.
        examples: an input and an output of each stage, for their shapes and ``requires_grad``.
        dw_builder: returns what runs weight gradients, if stages leave them out of the backward.
    """
    indices = (rank, 2 * num_ranks - 1 - rank)
    built: list[_PipelineStageBase] = [
        PipelineStage(
            stage, index, 2 * num_ranks, torch.device("cpu"), *example, dw_builder=dw_builder
        )
        for stage, index, example in zip(stages, indices, examples, strict=True)
    ]
    return ScheduleDualPipeV(built, num_chunks, loss_fn=criterion, scale_grads=False)


def build_torch_1f1b(
    stage: nn.Module,
    rank: int,
    num_ranks: int,
    num_chunks: int,
    criterion: Criterion,
    example: tuple[Tensor, Tensor],
    dw_builder: Callable[[], Callable[..., None]] | None = None,
) -> Schedule1F1B:
    """Builds torch's 1F1B for stage ``rank``; arguments as for DualPipeV."""
    built = PipelineStage(
        stage, rank, num_ranks, torch.device("cpu"), *example, dw_builder=dw_builder
    )
    return Schedule1F1B(built, num_chunks, loss_fn=criterion, scale_grads=False)
