"""Stages that an adapter cuts out of a model, and the plan that says which they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from dualpipe_ext.adapters.cost import Cost

__all__ = ["Outputs", "PartitionPlan", "Stage", "StagePlan"]

Outputs = Tensor | tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Stage:
    """What an adapter cuts out of a model for one stage.

    Attributes:
        module: holds only the stage's parameters and buffers, under the model's names.
        run: ``run(module, *tensors)`` is the stage's forward.
    """

    module: nn.Module
    run: Callable[..., Outputs]


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        layers: the layers that it runs, by their names in the model.
        names: the keys of its ``state_dict()``, which are the model's own.
        cost: its parameters, and its times and activations if layers were measured.
    """

    layers: tuple[str, ...]
    names: tuple[str, ...]
    cost: Cost


@dataclass(frozen=True)
class PartitionPlan:
    """How a model was cut, and which of the partitions this is.

    Attributes:
        architecture: the name of the model's class.
        num_partitions: the number of stages.
        index: the number of this partition's stage.
        stages: all stages, in order.
        inputs: what the first stage takes, in the order of ``step()``.
        ties: parameters that two stages hold, as (stage, name) of each place.
        layer_seconds: seconds of F, I and W together for each layer by name, if measured.
        layer_parameters: the number of elements of each layer's parameters.
        is_paired: whether rank r holds stages r and P-1-r; otherwise each stage has its own rank.
        is_causal: whether it is a causal language model of transformers, or derived from one:
            labels are the model's own tokens, each for the position before it.
    """

    architecture: str
    num_partitions: int
    index: int
    stages: tuple[StagePlan, ...]
    inputs: tuple[str, ...]
    ties: tuple[tuple[tuple[int, str], ...], ...] = ()
    layer_seconds: Mapping[str, float] = field(default_factory=dict)
    layer_parameters: Mapping[str, int] = field(default_factory=dict)
    is_paired: bool = True
    is_causal: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of this partition."""
        return self.stages[self.index].layers

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of this partition's ``state_dict()``."""
        return self.stages[self.index].names

    def share_of(self, layer: str) -> float:
        """Returns a layer's share of the time of its stage.

        If times were not measured, it is the share of parameters. What runs before all layers is
        not counted, as an embedding takes little time; a head after them is.
        """
        stage = next(stage for stage in self.stages if layer in stage.layers)
        if layer in self.layer_seconds and stage.cost.seconds > 0:
            return self.layer_seconds[layer] / stage.cost.seconds
        of_layers = sum(self.layer_parameters.get(name, 0) for name in stage.layers)
        total = stage.cost.num_parameters if stage is self.stages[-1] else of_layers
        if not of_layers:
            return 1 / len(stage.layers)
        return self.layer_parameters.get(layer, 0) / max(total, of_layers)
