"""Checks the number of partitions, and of layers in each, that a user asks for."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["check_criterion", "check_num_partitions", "check_num_parts", "check_sizes"]


def check_num_partitions(num_partitions: int, num_layers: int, model: str, paired: bool) -> None:
    """Raises if a model cannot be cut into this number of partitions."""
    if not isinstance(num_partitions, int) or isinstance(num_partitions, bool):
        raise TypeError(
            f"num_partitions={num_partitions!r}: it must be an int, not "
            f"{type(num_partitions).__name__}"
        )
    if num_partitions < 2 or (paired and num_partitions % 2):
        even = (
            "even and at least 2, for rank r holds stages r and P-1-r" if paired else "at least 2"
        )
        raise ValueError(
            f"num_partitions={num_partitions}, the number of stages: it must be {even}"
        )
    if num_partitions > num_layers:
        raise ValueError(
            f"num_partitions={num_partitions}, but the {model} has {num_layers} layers, and none "
            f"of them can be cut; use at most {num_layers - (num_layers % 2 if paired else 0)}"
        )


def check_criterion(balance: str) -> None:
    """Raises for an unknown balance criterion."""
    if balance not in ("time", "memory", "parameters"):
        raise ValueError(
            f"balance={balance!r}: choose 'time', 'memory' or 'parameters', or give the number of "
            f"layers of each stage, as in balance=[2, 3]"
        )


def check_num_parts(
    num_partitions: int, parts: Sequence[range], layers: Sequence[str], model: str
) -> None:
    """Raises if skip connections leave a model with fewer parts than partitions."""
    if num_partitions > len(parts):
        joined = max(parts, key=len)
        raise ValueError(
            f"num_partitions={num_partitions}, but {model} has a skip connection across "
            f"{layers[joined[0]]} to {layers[joined[-1]]}: they have to be on one stage, which leaves "
            f"{len(parts)} parts; use at most {len(parts) - len(parts) % 2}, or let those layers take "
            f"and return what passes them by"
        )


def check_sizes(sizes: Sequence[int], num_partitions: int, num_layers: int) -> list[int]:
    """Returns the sizes as a list; raises if they do not fit the model.

    The first and the last stage may have no layers: they have the embedding and the head.
    """
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"balance={list(sizes)!r}: {size!r} is no number of layers")
    if len(sizes) != num_partitions:
        raise ValueError(
            f"balance={list(sizes)} has {len(sizes)} sizes for {num_partitions} partitions; give "
            f"one each"
        )
    if sum(sizes) != num_layers:
        raise ValueError(
            f"balance={list(sizes)} adds up to {sum(sizes)}; the model has {num_layers} layers"
        )
    if min(sizes) < 0 or any(size == 0 for size in sizes[1:-1]):
        raise ValueError(
            f"balance={list(sizes)}: every stage but the first and the last needs a layer"
        )
    return list(sizes)
