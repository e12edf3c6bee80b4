"""What all adapters have in common: they cut a model into complete partitions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext.adapters.balance import agreed
from dualpipe_ext.adapters.complete import check_complete, find_ties
from dualpipe_ext.adapters.cost import Cost, parameter_cost
from dualpipe_ext.adapters.measure import measure
from dualpipe_ext.adapters.partition import Partition
from dualpipe_ext.adapters.parts import Parts, Split, single_layers
from dualpipe_ext.adapters.plan import PartitionPlan, Stage, StagePlan
from dualpipe_ext.adapters.sizes import (
    check_criterion,
    check_num_partitions,
    check_num_parts,
    check_sizes,
)
from dualpipe_ext.adapters.table import print_plan
from dualpipe_ext.config import Balance
from dualpipe_ext.groups import PipelineGroup, is_first_rank

__all__ = ["ModelAdapterBase", "is_causal_model"]


class ModelAdapterBase(ABC):
    """Knows how to cut one kind of model into stages.

    A subclass names the layers between which a model may be cut, and cuts it. What runs before the
    first layer belongs to the first stage, and what runs after the last layer to the last stage.

    Args:
        model: the model to cut. Partitions use its parameters; the model itself is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def layers(self) -> list[str]:
        """The names of the layers in the model, in the order in which they run."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """The arguments of the model's forward that the first stage takes, in this order."""

    @abstractmethod
    def cut(self, stages: Sequence[range]) -> list[Stage]:
        """Cuts the model; ``stages[s]`` are the indices of the layers of stage s.

        The first and the last range may be empty, for only the embedding or only the head.
        """

    def sample_inputs(self) -> tuple[Tensor | None, ...]:
        """Returns a micro-batch to measure layers with, if the adapter can make one up.

        Raises:
            ValueError: it cannot.
        """
        raise ValueError(
            f"layers of a {type(self.model).__name__} are measured with a micro-batch; pass "
            f"sample_inputs=({', '.join(self.inputs)},)"
        )

    def partition(
        self,
        num_partitions: int,
        balance: Balance = "parameters",
        *,
        sample_inputs: Sequence[Tensor | None] | None = None,
        costs: Sequence[Cost] | None = None,
        paired: bool = True,
        process_group: dist.ProcessGroup | PipelineGroup | None = None,
        show: bool = True,
    ) -> list[Partition]:
        """Cuts the model into stages.

        ``"parameters"`` minimizes the parameters of the fullest rank, ``"memory"`` the bytes that
        the fullest rank needs in training, and ``"time"`` the simulated step. The latter two
        measure each layer (F, I, W, activations); then every rank of the group calls this, and all
        use what rank 0 measured.

        Args:
            num_partitions: the number of stages; even if they are ``paired``, and at most the
                number of layers.
            balance: what to even out over the ranks, or how many layers each stage gets.
            sample_inputs: one micro-batch of :attr:`inputs`, to measure layers with; by default one
                that the adapter makes up, if it can.
            costs: what :meth:`measure` returned, instead of measuring here.
            paired: rank r holds stages r and P-1-r, and both count, as with DualPipe and schedules
                in a V. Otherwise each stage counts by itself.
            process_group: the ranks that have to agree; by default torch's default group, if there
                is one.
            show: print the result on rank 0.

        Returns:
            The partitions, by stage. Together they hold each of the model's parameters and
            buffers, under the model's names.

        Raises:
            ValueError: the number of partitions or the sizes do not fit the model, or its layers
                cannot be separated, with the reason.
            TypeError: ``num_partitions`` or a size is not an int.
        """
        num_layers, kind = len(self.layers), type(self.model).__name__
        check_num_partitions(num_partitions, num_layers, kind, paired)
        if isinstance(balance, str):
            check_criterion(balance)
            parts = self.parts()
            check_num_parts(num_partitions, parts, self.layers, kind)
            if costs is None:
                costs = self._costs(balance, parts, sample_inputs, process_group)
            measured = Parts(parts, list(costs))
            split = measured.split(num_partitions, balance, paired)
            partitions = self._partitions(split, paired, measured.layer_seconds(self.layers))
        else:
            sizes = check_sizes(balance, num_partitions, num_layers)
            ranges = [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]
            partitions = self._partitions(Split(ranges, []), paired, {})
        if show and is_first_rank(process_group):
            print_plan(partitions[0].plan)
        return partitions

    def parts(self) -> list[range]:
        """Returns the parts that can be on different stages, as indices of layers.

        A part is one layer, unless something joins several. The first part is what runs before all
        layers; what runs after them is the last part or belongs to it.
        """
        return single_layers(len(self.layers))

    def measure(self, sample_inputs: Sequence[Tensor | None] | None = None) -> list[Cost]:
        """Measures what each of :meth:`parts` costs: F, I, W and activations.

        Args:
            sample_inputs: as for :meth:`partition`.

        Raises:
            ValueError: there are no inputs to measure with, or the model has no values.
        """
        inputs = self.sample_inputs() if sample_inputs is None else sample_inputs
        return measure(self.cut(self.parts()), inputs)

    def _costs(
        self,
        balance: str,
        parts: Sequence[range],
        sample_inputs: Sequence[Tensor | None] | None,
        process_group: dist.ProcessGroup | PipelineGroup | None,
    ) -> list[Cost]:
        """Returns the costs of the parts, measured if times or activations count."""
        if balance == "parameters":
            return [parameter_cost(piece.module) for piece in self.cut(parts)]
        return agreed(lambda: self.measure(sample_inputs), process_group)

    def _partitions(
        self, split: Split, paired: bool, layer_seconds: Mapping[str, float]
    ) -> list[Partition]:
        stages = self.cut(split.ranges)
        plan = self._plan(stages, split, paired, layer_seconds)
        partitions = [Partition(s, replace(plan, index=i)) for i, s in enumerate(stages)]
        for partition, mirror in zip(partitions, reversed(partitions), strict=True):
            partition.set_mirror(mirror)
        return partitions

    def _plan(
        self,
        stages: Sequence[Stage],
        split: Split,
        paired: bool,
        layer_seconds: Mapping[str, float],
    ) -> PartitionPlan:
        check_complete(self.model, stages)
        layers = self.layers
        costs = split.costs or [parameter_cost(stage.module) for stage in stages]
        return PartitionPlan(
            architecture=type(self.model).__name__,
            num_partitions=len(stages),
            index=0,
            stages=tuple(
                StagePlan(tuple(layers[i] for i in own), tuple(stage.module.state_dict()), cost)
                for stage, own, cost in zip(stages, split.ranges, costs, strict=True)
            ),
            inputs=self.inputs,
            ties=find_ties(stages),
            layer_seconds=layer_seconds,
            layer_parameters={
                name: parameter_cost(module).num_parameters
                for name, module in self.model.named_modules()
                if name in layers
            },
            is_paired=paired,
            is_causal=is_causal_model(self.model),
        )


def is_causal_model(model: nn.Module) -> bool:
    """Whether its class or a base class is a causal language model of transformers."""
    return any(
        kind.__name__.endswith(("ForCausalLM", "LMHeadModel"))
        and kind.__module__.startswith(("transformers.", "transformers_modules."))
        for kind in type(model).__mro__
    )
