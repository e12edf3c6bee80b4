"""The parts of a model that can be on different stages, with their costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dualpipe_ext.adapters.balance import balanced_sizes, sum_of
from dualpipe_ext.adapters.cost import Cost

__all__ = ["Parts", "Split", "single_layers"]


@dataclass(frozen=True)
class Split:
    """The layers of each stage, by index, and the costs of the stages."""

    ranges: list[range]
    costs: list[Cost]


def single_layers(num_layers: int) -> list[range]:
    """Returns separate parts: what runs before all layers, each layer, and what runs after them."""
    singles = [range(i, i + 1) for i in range(num_layers)]
    return [range(0), *singles, range(num_layers, num_layers)]


@dataclass(frozen=True)
class Parts:
    """Parts of a model, in order, each with its cost."""

    ranges: list[range]
    costs: list[Cost]

    def split(self, num_stages: int, criterion: str, paired: bool) -> Split:
        """Assigns consecutive parts to stages, evened out as :func:`balanced_sizes` does."""
        counts = balanced_sizes(self.costs, num_stages, criterion, paired)
        edges = list(accumulate((len(part) for part in self.ranges), initial=0))
        stages = pairwise(accumulate(counts, initial=0))
        ranges = [range(edges[first], edges[last]) for first, last in stages]
        return Split(ranges, sum_of(self.costs, counts))

    def layer_seconds(self, layers: Sequence[str]) -> dict[str, float]:
        """Returns the time of each layer, an equal share of its part's; empty if not measured."""
        return {
            layers[i]: cost.seconds / len(part)
            for part, cost in zip(self.ranges, self.costs, strict=True)
            for i in part
            if cost.seconds
        }
