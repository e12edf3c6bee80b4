"""The stages of one rank, adopted from the user's modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import chain
from typing import Any

import torch
from torch import nn

from dualpipe_ext import _C
from dualpipe_ext._advice import warn_caller
from dualpipe_ext._data_parallel import FullyShardedStages, check_not_wrapped
from dualpipe_ext._memory import save_memory
from dualpipe_ext._mirrors import (
    MirroredStages,
    check_memory,
    describe_stage,
    shared_parameters,
)
from dualpipe_ext._overlap import find_overlapped
from dualpipe_ext._source import ScheduleSource
from dualpipe_ext._transport import GpuSettings, gpu_settings, offered_transport
from dualpipe_ext.adapters.placing import place_partitions, split_of
from dualpipe_ext.config import DualPipeConfig, Transport
from dualpipe_ext.groups import PipelineGroup
from dualpipe_ext.schedule import Schedule
from dualpipe_ext.weight_grad import (
    WeightSplitReport,
    defer_weight_gradients,
    undo_defer_weight_gradients,
    weight_split,
)

__all__ = ["LocalStages"]

HOST_LOOKAHEAD = 2


class LocalStages:
    """The stages of one rank, checked and prepared for the engine.

    Attributes:
        source: where the schedules of steps come from.
        num_stages: the number of stages of the whole model.
        stages: the stages of this rank, in the order of ``modules``.
        device: the device of their tensors.
        overlapped: the stages' own ``overlapped_forward_backward``, if they have one.
        weight_split: which weight gradients W computes.
        mirrors: the other copies of the stages; ``None`` if there are none.
        fully_sharded: what FSDP2 has sharded of them.
        offer: what the messages of this rank can travel over.
        transport: what they travel over, once :meth:`use_transport` has set it.
        gpu: how messages travel from GPU to GPU; ``None``: they travel in host memory.

    Raises:
        ValueError, TypeError: the modules or the configuration do not suit the schedule.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        schedule: str | Schedule,
        group: PipelineGroup,
        config: DualPipeConfig,
    ) -> None:
        self._group = group
        self._config = config
        self._rank = group.rank
        self.source = ScheduleSource.of(schedule, group.size, len(modules))
        self._layout = self.source.smallest()
        self.num_stages = self._layout.num_stages
        self.stages = self._layout.stages_of(self._rank)
        self.modules = place_partitions(modules, self.stages, self.num_stages)
        self._check()
        found = _device_of(self.modules)
        self.device = found or torch.device("cpu")
        save_memory(self.modules, "none")  # undoes what another pipeline did to them
        self.overlapped = find_overlapped(self.modules if config.use_overlapped else [])
        self.weight_split = self._split_weights()
        save_memory(self.modules, config.memory_optimization)
        self.mirrors = self._find_mirrors()
        self.fully_sharded = FullyShardedStages(self.modules, config.timeout)
        self.offer = offered_transport(config, found, threads=group.are_threads)
        self.transport: Transport = "host"
        self.gpu: GpuSettings | None = None
        self._warn_of_what_is_unusual()

    def use_transport(self, transport: Transport, reason: str) -> None:
        """Adopts the transport that all ranks chose; if it is a fallback, rank 0 warns why."""
        self.transport = transport
        if reason and self._rank == 0:
            warn_caller(
                f"messages between GPUs are staged through host memory: {reason}; "
                f"DualPipeConfig(transport='host') says that this is meant"
            )
        if transport == "host":
            return
        if self.offer["is_anywhere"]:
            self.device = torch.device("cuda", torch.cuda.current_device())
        own_ways = self._ways_of(self._rank)
        others = [r for r in range(self._group.size) if r != self._rank]
        num_ways = [len(self._ways_of(r)) for r in others] if self._group.are_threads else []
        self.gpu = gpu_settings(transport, self._config, self.device, own_ways, num_ways)

    @property
    def lookahead(self) -> int:
        """How many computations ahead of its use a receive is posted (``DualPipeConfig``)."""
        chosen = self._config.lookahead
        if chosen is not None:
            return chosen
        return HOST_LOOKAHEAD if self.gpu is None else 0

    @property
    def is_first_with_losses(self) -> bool:
        """Whether no lower rank holds the last stage."""
        holding = (
            r for r in range(self._group.size) if self.num_stages - 1 in self._layout.stages_of(r)
        )
        return next(holding) == self._rank

    def peers(self) -> list[int]:
        """Returns the ranks that this one may exchange messages with, and greets in each step."""
        num_ranks = self._group.size
        found = {(self._rank - 1) % num_ranks, (self._rank + 1) % num_ranks}
        if self.mirrors is not None:
            found.add(num_ranks - 1 - self._rank)
        return sorted(found - {self._rank})

    def describe(self) -> dict[str, Any]:
        """Returns what this rank tells the others."""
        layout = self._layout
        with_values = self._config.mirror_init == "check"
        shared = shared_parameters(self.modules)
        described = {
            str(stage): describe_stage(module, shared, with_values=with_values)
            for stage, module in zip(self.stages, self.modules, strict=True)
        }
        return {
            "version": _C.version,
            "torch": torch.__version__,
            "ranks": self._group.size,
            "schedule name": self.source.name,
            "schedule": f"{layout.placement} placement, {layout.num_stages} stages, "
            f"digest {layout.digest():016x}",
            **{
                f"DualPipeConfig.{field.name}": repr(getattr(self._config, field.name))
                for field in fields(self._config)
            },
            "layers of stages": split_of(self.modules),
            "overlapped": self.overlapped.function is not None,
            "offer": self.offer,
            "are sharded": self.mirrors is not None and self.mirrors.are_sharded,
            "has shards": bool(self.fully_sharded),
            "stages": described if self.mirrors is not None else {},
            "warnings": self._warnings_for_all(),
        }

    def _check(self) -> None:
        name, num_ranks = self.source.name, self._group.size
        if self._config.num_stages not in (0, self.num_stages):
            raise ValueError(
                f"num_stages={self._config.num_stages}, but {name} on {num_ranks} ranks has "
                f"{self.num_stages} stages; configure num_stages={self.num_stages}, or start "
                f"another number of ranks"
            )
        for module in self.modules:
            if not isinstance(module, nn.Module):
                raise TypeError(f"modules must be nn.Modules; found a {type(module).__name__}")
        if len(self.modules) != len(self.stages):
            raise ValueError(
                f"{len(self.modules)} modules were given; {name} on {num_ranks} ranks needs "
                f"{len(self.stages)} on rank {self._rank}: those of stages {self.stages}"
            )
        if len({id(module) for module in self.modules}) < len(self.modules):
            raise ValueError(
                f"the same module was given twice; rank {self._rank} needs two different ones, "
                f"those of stages {self.stages} (a partition that an adapter made may be given "
                f"twice: it knows the other one)"
            )
        devices = sorted({str(p.device) for module in self.modules for p in module.parameters()})
        if len(devices) > 1:
            raise ValueError(
                f"the parameters of rank {self._rank} are on {' and '.join(devices)}; move its "
                f"stages {self.stages} to one device"
            )
        for stage, module in zip(self.stages, self.modules, strict=True):
            check_not_wrapped(stage, module)
            tensors = chain(module.named_parameters(), module.named_buffers())
            if lost := [name for name, tensor in tensors if tensor.is_meta]:
                raise ValueError(
                    f"{lost[0]} of stage {stage} (rank {self._rank}) is on the meta device, "
                    f"without a value; call to_empty(device=...) on the module and load its values "
                    f"first"
                )

    def _split_weights(self) -> WeightSplitReport:
        stages = nn.ModuleList(self.modules)
        if self._config.split_weight_gradients:
            return defer_weight_gradients(stages)
        undo_defer_weight_gradients(stages)
        return weight_split(nn.ModuleList())

    def _find_mirrors(self) -> MirroredStages | None:
        if self._layout.mirror_of(self._rank) is None:
            return None
        check_memory(self.stages, self.modules)
        return MirroredStages(self._rank, self._group.size, self.stages, self.modules, self.device)

    def _ways_of(self, rank: int) -> list[_C.MessageWay]:
        ways = _C.Program(self._layout.lower().native, rank, "").message_ways
        if self.mirrors is not None:
            ways += _C.mirror_ways(rank, self._group.size)
        return ways

    def _warn_of_what_is_unusual(self) -> None:
        if self.overlapped.problem:
            warn_caller(
                f"rank {self._rank}: {self.overlapped.problem}; forward and backward of a pair "
                f"run one after the other"
            )
        if self._config.seed is not None and self._group.are_threads:
            warn_caller(
                f"rank {self._rank}: seed={self._config.seed} cannot hold for ranks that are "
                f"threads: they share torch's one generator; use processes"
            )

    def _warnings_for_all(self) -> dict[str, str]:
        """Returns, by topic, warnings that not every rank needs to give."""
        drifting = self.mirrors.drifting_buffers() if self.mirrors else []
        if not drifting:
            return {}
        text = (
            f"{drifting[0]}, as all running statistics of batch norms, will differ between the two "
            f"copies of its stage, for each sees its own half of the batch; in a loop of your own "
            f"call sync_buffers() before evaluating, or saving a state_dict(); TrainingWrapper, the "
            f"trainers and save_checkpoint() do so by themselves; norms without running statistics "
            f"do not need it"
        )
        return {"batch norms": text}


def _device_of(modules: Sequence[nn.Module]) -> torch.device | None:
    """Returns the device of the parameters, else of the buffers; ``None`` if there are neither."""
    parameters = (parameter.device for module in modules for parameter in module.parameters())
    buffers = (buffer.device for module in modules for buffer in module.buffers())
    return next(chain(parameters, buffers), None)
