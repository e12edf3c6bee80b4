"""How many layers each stage gets: what can be asked for."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["check_num_partitions", "check_num_parts", "check_sizes"]


def check_num_partitions(num_partitions: int, num_layers: int, model: str) -> None:
    """Raises where a model cannot be cut into so many partitions."""
    if not isinstance(num_partitions, int) or isinstance(num_partitions, bool):
        raise TypeError(
            f"num_partitions={num_partitions!r}: it must be an int, not "
            f"{type(num_partitions).__name__}"
        )
    if num_partitions < 2 or num_partitions % 2:
        raise ValueError(
            f"num_partitions={num_partitions}: it must be even and at least 2, for models are cut "
            f"for DualPipe, whose rank r holds stages r and P-1-r; choose another number of stages, "
            f"or give the pipeline of another schedule stages of your own"
        )
    if num_partitions > num_layers:
        raise ValueError(
            f"num_partitions={num_partitions}, but the {model} has {num_layers} layers, and none "
            f"of them can be cut; use at most {num_layers - num_layers % 2}"
        )


def check_num_parts(
    num_partitions: int, parts: Sequence[range], layers: Sequence[str], model: str
) -> None:
    """Raises where skip connections leave a model in fewer parts than partitions."""
    if num_partitions > len(parts):
        joined = max(parts, key=len)
        raise ValueError(
            f"num_partitions={num_partitions}, but {model} has a skip connection across "
            f"{layers[joined[0]]} to {layers[joined[-1]]}: they have to be on one stage, which leaves "
            f"{len(parts)} parts; use at most {len(parts) - len(parts) % 2}, or let those layers take "
            f"and return what passes them by"
        )


def check_sizes(sizes: Sequence[int], num_partitions: int, num_layers: int) -> list[int]:
    """The sizes as a list; raises where they do not fit.

    The first and the last stage may have no layer: embedding and head are work enough.
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
