"""The peers: upstream DualPipe and the schedules of ``torch.distributed.pipelining``.

Upstream needs CUDA in two places, a check of the device and the allocation of receive buffers.
Both are replaced at run time here, so that it runs over gloo; nothing else of it is touched.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV
from torch.distributed.pipelining.stage import _PipelineStageBase

Criterion = Callable[..., Tensor]


def load_upstream(checkout: Path) -> ModuleType:
    """Import upstream's package from a checkout and make it run on the CPU.

    Raises:
        ValueError: If the folder is not a checkout of deepseek-ai/DualPipe.
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

    comm.build_from_tensor_shapes = cpu_buffers
    package: ModuleType = dualpipe
    return package


def build_upstream(
    upstream: ModuleType, stages: Sequence[nn.Module], message_shape: tuple[int, ...]
) -> Any:
    """Build upstream's ``DualPipe`` for messages of float32 of one shape."""
    upstream.set_p2p_tensor_shapes([message_shape])
    upstream.set_p2p_tensor_dtype(torch.float32)
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
    """Build torch's DualPipeV for the stages ``rank`` and ``2 * num_ranks - 1 - rank``.

    Args:
        stages: The two modules of this rank.
        rank: This rank.
        num_ranks: Number of ranks.
        num_chunks: Number of micro-batches.
        criterion: Loss of the last stage.
        examples: An input and an output of each stage, for their shapes and ``requires_grad``.
        dw_builder: What runs weight gradients, where a stage leaves them out of its backward.
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
    """Build torch's 1F1B for stage ``rank``; arguments as for DualPipeV."""
    built = PipelineStage(
        stage, rank, num_ranks, torch.device("cpu"), *example, dw_builder=dw_builder
    )
    return Schedule1F1B(built, num_chunks, loss_fn=criterion, scale_grads=False)
