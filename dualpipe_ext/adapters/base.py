"""What all adapters have in common: a model goes in, complete partitions come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext.adapters.balance import Balance, agreed, balanced_sizes, sum_of
from dualpipe_ext.adapters.complete import check_complete, find_ties
from dualpipe_ext.adapters.cost import Cost, parameter_cost
from dualpipe_ext.adapters.measure import measure
from dualpipe_ext.adapters.partition import Partition
from dualpipe_ext.adapters.plan import PartitionPlan, Stage, StagePlan
from dualpipe_ext.adapters.sizes import check_num_partitions, check_sizes
from dualpipe_ext.adapters.table import print_plan
from dualpipe_ext.groups import PipelineGroup, is_first_rank

__all__ = ["ModelAdapterBase", "predicts_next_token"]


class ModelAdapterBase(ABC):
    """Knows how one kind of model is cut into stages.

    A subclass names the layers that a model may be cut between, and cuts it. What runs before the
    first layer belongs to the first stage, what runs behind the last one to the last stage.

    Args:
        model: what is to be cut. Partitions use its parameters; the model itself is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def layers(self) -> list[str]:
        """The layers, by their names in the model, in the order in which they run."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """What the first stage takes: arguments of the model's forward, in this order."""

    @abstractmethod
    def cut(self, stages: Sequence[range]) -> list[Stage]:
        """Cuts the model; ``stages[s]`` are the indices of the layers of stage s.

        The first and the last range may be empty: embedding and head alone.
        """

    def sample_inputs(self) -> tuple[Tensor | None, ...]:
        """One micro-batch to measure layers with, where the adapter can make one up.

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
        process_group: dist.ProcessGroup | PipelineGroup | None = None,
        show: bool = True,
    ) -> list[Partition]:
        """Cuts the model into stages.

        Rank r holds stages r and P-1-r, and both count: ``"parameters"`` makes the fullest rank as
        small as possible, ``"memory"`` the one that needs most bytes in training, and ``"time"``
        the simulated step as short as possible. The latter two measure each layer (F, I, W,
        activations); every rank of the group calls it, and all take what rank 0 measured.

        Args:
            num_partitions: how many; even, and at most one for each layer.
            balance: what is evened out over the ranks, or how many layers each stage gets.
            sample_inputs: one micro-batch of :attr:`inputs`, to measure layers with. Left out, one
                that the adapter makes up, if it can.
            process_group: the ranks that have to agree; left out, torch's default group where
                there is one.
            show: print the result, on rank 0.

        Returns:
            The partitions, by stage. Together they hold each of the model's parameters and
            buffers, under the model's names.

        Raises:
            ValueError: a number of partitions or sizes that do not fit the model, or a model whose
                layers cannot be separated, with the reason.
            TypeError: ``num_partitions`` or a size is no int.
        """
        num_layers = len(self.layers)
        check_num_partitions(num_partitions, num_layers, type(self.model).__name__)
        costs: list[Cost] = []
        if isinstance(balance, str):
            costs = self._costs(balance, sample_inputs, process_group)
            sizes = _without_ends(balanced_sizes(costs, num_partitions, balance))
        else:
            sizes = check_sizes(balance, num_partitions, num_layers)
        partitions = self._partitions(sizes, costs)
        if show and is_first_rank(process_group):
            print_plan(partitions[0].plan)
        return partitions

    def pieces(self) -> list[Stage]:
        """What comes before the first layer, each layer, and what comes behind the last one."""
        num_layers = len(self.layers)
        ranges = [range(i, i + 1) for i in range(num_layers)]
        return self.cut([range(0), *ranges, range(num_layers, num_layers)])

    def _costs(
        self,
        balance: str,
        sample_inputs: Sequence[Tensor | None] | None,
        process_group: dist.ProcessGroup | PipelineGroup | None,
    ) -> list[Cost]:
        """The costs of the pieces; measured ones where times or activations count."""
        if balance not in ("time", "memory", "parameters"):
            raise ValueError(
                f"balance={balance!r}: choose 'time', 'memory' or 'parameters', or give the number "
                f"of layers of each stage, as in balance=[2, 3]"
            )
        if balance == "parameters":
            return [parameter_cost(piece.module) for piece in self.pieces()]
        return agreed(
            lambda: measure(
                self.pieces(), self.sample_inputs() if sample_inputs is None else sample_inputs
            ),
            process_group,
        )

    def _partitions(self, sizes: Sequence[int], costs: Sequence[Cost]) -> list[Partition]:
        ranges = [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]
        stages = self.cut(ranges)
        plan = self._plan(stages, ranges, costs)
        partitions = [Partition(s, replace(plan, index=i)) for i, s in enumerate(stages)]
        for partition, mirror in zip(partitions, reversed(partitions), strict=True):
            partition.set_mirror(mirror)
        return partitions

    def _plan(
        self, stages: Sequence[Stage], ranges: Sequence[range], costs: Sequence[Cost]
    ) -> PartitionPlan:
        check_complete(self.model, stages)
        layers = self.layers
        timed = any(cost.seconds for cost in costs)
        if costs:
            by_stage = sum_of(costs, _with_ends([len(own) for own in ranges]))
        else:
            by_stage = [parameter_cost(stage.module) for stage in stages]
        return PartitionPlan(
            architecture=type(self.model).__name__,
            num_partitions=len(stages),
            index=0,
            stages=tuple(
                StagePlan(tuple(layers[i] for i in own), tuple(stage.module.state_dict()), cost)
                for stage, own, cost in zip(stages, ranges, by_stage, strict=True)
            ),
            inputs=self.inputs,
            ties=find_ties(stages),
            layer_seconds={
                name: cost.seconds for name, cost in zip(layers, costs[1:], strict=False) if timed
            },
            is_causal=predicts_next_token(self.model),
        )


def predicts_next_token(model: nn.Module) -> bool:
    """Whether it is a causal language model of Hugging Face, by its name."""
    names = [each.__name__ for each in type(model).__mro__]
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _with_ends(sizes: Sequence[int]) -> list[int]:
    """Layers by stage -> pieces by stage: those before and behind all layers count as well."""
    return [sizes[0] + 1, *sizes[1:-1], sizes[-1] + 1]


def _without_ends(sizes: Sequence[int]) -> list[int]:
    return [sizes[0] - 1, *sizes[1:-1], sizes[-1] - 1]
