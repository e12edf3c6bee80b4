"""Splits a row of costs into contiguous stages that are optimal for the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["best_for_ranks", "best_for_stages", "fronts"]

Costs = npt.NDArray[np.float64]


def best_for_ranks(costs: Sequence[float], num_stages: int) -> list[int]:
    """Returns the sizes of the split with the cheapest costliest rank. Exact.

    Rank r holds stages r and P-1-r. Among splits whose costliest ranks are equal, the one with the
    cheapest costliest stage is chosen.
    """
    first, *others = fronts(costs, num_stages)
    best = first
    for candidate in others:
        if candidate[0] > first[0] * (1 + 1e-12):
            break
        best = candidate
    return best[2]


def best_for_stages(costs: Sequence[float], num_stages: int) -> list[int]:
    """Returns the sizes, from 1, of the split with the cheapest costliest stage. Exact."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])
    count = len(sums)
    spans = sums[None, :] - sums[:, None]  # [i, j]: the cost of items i to j-1
    spans[np.tril_indices(count)] = np.inf
    best = spans[0]  # [j]: the costliest stage of items 0 to j-1, in the stages so far
    edges = []
    for _ in range(num_stages - 1):
        worst = np.maximum(best[:, None], spans)
        edges.append(worst.argmin(axis=0))
        best = worst.min(axis=0)
    last = count - 1
    sizes: list[int] = []
    for before in reversed(edges):
        sizes.insert(0, int(last - before[last]))
        last = int(before[last])
    return [last, *sizes]


def fronts(costs: Sequence[float], num_stages: int) -> Iterator[tuple[float, float, list[int]]]:
    """Yields (costliest rank, costliest stage, sizes) of splits that no other beats in both.

    They come in the order of increasing costliest ranks and decreasing costliest stages. Exact:
    each is found by dynamic programming over all contiguous splits, from the outer pair of stages
    inwards.

    Args:
        costs: the cost of each item, 0 or more; at least one item for each stage.
        num_stages: the number of stages; even.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])
    limit = float("inf")
    while (sizes := _split(sums, num_stages // 2, limit)) is not None:
        edges = np.cumsum([0, *sizes])
        stages = sums[edges[1:]] - sums[edges[:-1]]
        limit = float(stages.max())  # the next split must have faster stages
        yield float((stages + stages[::-1]).max()), limit, sizes


def _split(sums: Costs, num_pairs: int, limit: float) -> list[int] | None:
    """Finds the split with the cheapest costliest pair, of stages that cost less than ``limit``."""
    count = len(sums)
    rest = np.full((count, count), np.inf)  # [i, j]: the worst pair when items i to j-1 are left
    rest[0, count - 1] = 0.0
    history = [rest]
    for _ in range(num_pairs):
        history.append(_add_pair(history[-1], sums, limit))
    middle = int(np.argmin(np.diagonal(history[-1])))
    if not np.isfinite(history[-1][middle, middle]):
        return None
    return _trace_back(history, sums, limit, middle)


def _add_pair(rest: Costs, sums: Costs, limit: float) -> Costs:
    added = np.full_like(rest, np.inf)
    for i, j in np.argwhere(np.isfinite(rest)):
        left, right = _stages(sums, i, j, limit)
        pairs = np.maximum(rest[i, j], left[:, None] + right[None, :])
        added[i + 1 :, :j] = np.minimum(added[i + 1 :, :j], pairs)
    added[np.tril_indices(len(added), -1)] = np.inf  # stages that overlap
    return added


def _stages(sums: Costs, i: int, j: int, limit: float) -> tuple[Costs, Costs]:
    """Returns costs of stages of items i to k-1, for k > i, and of items k to j-1, for k < j."""
    left, right = sums[i + 1 :] - sums[i], sums[j] - sums[:j]
    return np.where(left < limit, left, np.inf), np.where(right < limit, right, np.inf)


def _trace_back(history: list[Costs], sums: Costs, limit: float, middle: int) -> list[int]:
    left_edges, right_edges = [middle], [middle]
    for rest, added in zip(history[-2::-1], history[:0:-1], strict=True):
        i, j = _before(rest, added, sums, limit, left_edges[0], right_edges[-1])
        left_edges.insert(0, i)
        right_edges.append(j)
    return [int(size) for size in np.diff([*left_edges, *right_edges[1:]])]


def _before(
    rest: Costs, added: Costs, sums: Costs, limit: float, i: int, j: int
) -> tuple[int, int]:
    """Returns which items were left before the pair that left items i to j-1."""
    for i_before, j_before in np.argwhere(np.isfinite(rest)):
        if i_before < i and j < j_before:
            left, right = _stages(sums, i_before, j_before, limit)
            pair = left[i - i_before - 1] + right[j]
            if max(rest[i_before, j_before], pair) == added[i, j]:
                return int(i_before), int(j_before)
    raise AssertionError("a split was found whose way cannot be found again")
