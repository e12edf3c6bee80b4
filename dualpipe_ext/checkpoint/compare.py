"""Checks that a checkpoint belongs to a model."""

from __future__ import annotations

from collections.abc import Sequence

from dualpipe_ext.checkpoint.holdings import Shapes
from dualpipe_ext.checkpoint.saved import Saved

__all__ = ["check_architecture"]

_NUM_SHOWN = 3


def check_architecture(saved: Saved, wanted: Shapes, architecture: str) -> None:
    """Raises ValueError, with the first differences, if names or shapes differ.

    Args:
        saved: the checkpoint.
        wanted: the names and shapes that the model has.
        architecture: the name of the model's class.
    """
    there = saved.shapes()
    missing = [name for name in wanted if name not in there]
    unexpected = [name for name in there if name not in wanted]
    reshaped = [
        f"{name} is {_shape(there[name])} there and {_shape(shape)} here"
        for name, shape in wanted.items()
        if name in there and there[name] != shape
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (
            ("it lacks", missing),
            ("the model lacks", unexpected),
            ("shapes differ:", reshaped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{saved.place} is a checkpoint of another architecture "
            f"({saved.manifest['architecture']}; this is {architecture}): {'; '.join(problems)}; "
            f"make the model with the settings that it was saved with"
        )


def _shape(shape: Sequence[int] | None) -> str:
    return "no tensor" if shape is None else str(tuple(shape))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more
