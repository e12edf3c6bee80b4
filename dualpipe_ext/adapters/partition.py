"""Partitions: modules of one stage each, which know the plan that they are part of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dualpipe_ext.adapters.plan import Outputs, PartitionPlan, Stage

__all__ = ["Partition"]


class Partition(nn.Module):
    """One stage of a model: a module that the pipeline calls with tensors.

    The first stage takes the inputs named by ``plan.inputs`` (trailing ones may be omitted or
    ``None``); each other stage takes what the previous one returned. The last stage returns what
    the model's forward returns, as tensors. Parameters are the model's own objects, not copies.

    Attributes:
        plan: the plan that this is a stage of.
    """

    def __init__(self, stage: Stage, plan: PartitionPlan) -> None:
        super().__init__()
        self.plan = plan
        self._stage = (stage,)  # in a tuple: the children are those of its module
        # The same dictionaries: moving or replacing a parameter here does so there, too.
        self._parameters = stage.module._parameters
        self._buffers = stage.module._buffers
        self._modules = stage.module._modules
        self._non_persistent_buffers_set = stage.module._non_persistent_buffers_set
        self.training = stage.module.training
        self._mirror: tuple[Partition, ...] = ()
        self._done: list[Callable[[Partition], object]] = []  # to be done to the mirror as well

    def forward(self, *tensors: Tensor | None) -> Outputs:
        """Runs the stage."""
        (stage,) = self._stage
        return stage.run(stage.module, *tensors)

    def train(self, mode: bool = True) -> Partition:
        """Sets training or evaluation mode."""
        self._stage[0].module.training = mode
        super().train(mode)
        return self

    def mirror(self) -> Partition:
        """Returns the stage that shares a rank with this one: P-1-r for r.

        What was applied to this partition (``cuda()``, ``to()``, ``half()``, ``to_empty()``) and
        its mode are applied to the mirror as well, and what the two share is shared again.
        """
        (mirror,) = self._mirror
        for action in self._done[len(mirror._done) :]:
            action(mirror)
        if mirror.training != self.training:
            mirror.train(self.training)
        _tie(self, mirror)
        return mirror

    def set_mirror(self, mirror: Partition) -> None:
        """Sets the other stage of this one's rank; for adapters."""
        self._mirror = (mirror,)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Partition:
        """Allocates memory, without values, for parameters and for buffers on the meta device.

        Buffers that have values keep them. Load the partition's ``state_dict()`` afterwards.

        Raises:
            ValueError: a buffer on the meta device is not in the ``state_dict()``.
        """
        saved = self.state_dict()
        if lost := [n for n, b in self.named_buffers() if b.is_meta and n not in saved]:
            raise ValueError(
                f"{', '.join(lost[:3])} cannot be given a value: the buffer is on the meta device, "
                f"and models are saved without it; make the model under "
                f"dualpipe_ext.adapters.empty_parameters(), which leaves buffers their values"
            )
        kept = [(n, b.to(device)) for n, b in self.named_buffers() if not b.is_meta]
        shared = _names_of_shared(self)
        super().to_empty(device=device, recurse=recurse)
        for name, buffer in kept:
            path, _, leaf = name.rpartition(".")
            self.get_submodule(path)._buffers[leaf] = buffer
        for first, *others in shared:
            for name in others:
                _share(self, name, self.get_parameter(first))
        self._done[-1] = lambda partition: partition.to_empty(device=device, recurse=recurse)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Partition:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._done.append(lambda partition: partition._apply(fn, recurse))
        return self

    def extra_repr(self) -> str:
        """Describes the stage and its layers."""
        plan = self.plan
        layers = " to ".join(dict.fromkeys((*plan.layers[:1], *plan.layers[-1:]))) or "no layers"
        return f"stage {plan.index} of {plan.num_partitions} of a {plan.architecture}: {layers}"


def _tie(partition: Partition, mirror: Partition) -> None:
    """Gives the mirror the partition's own object for each parameter that the two share.

    ``to_empty()`` replaces parameters on the meta device in each partition separately.
    """
    for names in partition.plan.ties:
        own = [name for stage, name in names if stage == partition.plan.index]
        for name in (name for stage, name in names if stage == mirror.plan.index):
            _share(mirror, name, partition.get_parameter(own[0]))


def _share(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = parameter


def _names_of_shared(module: nn.Module) -> list[list[str]]:
    """Returns the names of each parameter that has more than one."""
    names = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [found for found in names.values() if len(found) > 1]
