"""DualPipe and DualPipeV: the bidirectional schedule of DeepSeek-V3, and its cut-in-half form."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from dualpipe_ext.config import DualPipeConfig
from dualpipe_ext.groups import PipelineGroup
from dualpipe_ext.pipeline import Pipeline

__all__ = ["DualPipe", "DualPipeV"]


class DualPipe(Pipeline):
    """A pipeline that micro-batches enter at both ends: rank r of P holds stages r and P-1-r.

    P is even. One half of the batch enters at rank 0 and flows down; the other half enters at rank
    P-1 and flows up. Every stage has two copies, whose gradients are summed by
    :meth:`sync_gradients`. Each copy sees half of the batch: if stages update buffers (such as the
    running statistics of a batch norm), :meth:`sync_buffers` sets both copies to their mean.
    Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), section 3.2.1.

    Args:
        modules: (stage r, stage P-1-r); or the same partition of an adapter twice
            (:func:`dualpipe_ext.adapters.get_model_adapter`), as it knows its mirror.
        batch_dim: the dimension along which batches are split.
        process_group: the ranks, as for :class:`Pipeline`.
        rank_mapping: entry i is the position in the pipeline of the group's rank i.
        config: must be the same on every rank.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | PipelineGroup | None = None,
        rank_mapping: Sequence[int] | None = None,
        *,
        config: DualPipeConfig | None = None,
    ) -> None:
        super().__init__(modules, "dualpipe", batch_dim, process_group, rank_mapping, config=config)


class DualPipeV(Pipeline):
    """The model folded into a V: rank r of P holds stages r and 2P-1-r of 2P, one copy each.

    All data enters and leaves at rank 0. Source: "DualPipe could be better without the Dual" (Sea
    AI Lab, 2025), as in the reference implementation.

    Args:
        modules: (stage r, stage 2P-1-r).
        batch_dim: the dimension along which batches are split.
        process_group: the ranks, as for :class:`Pipeline`.
        rank_mapping: entry i is the position in the pipeline of the group's rank i.
        config: must be the same on every rank.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | PipelineGroup | None = None,
        rank_mapping: Sequence[int] | None = None,
        *,
        config: DualPipeConfig | None = None,
    ) -> None:
        super().__init__(
            modules, "dualpipev", batch_dim, process_group, rank_mapping, config=config
        )
