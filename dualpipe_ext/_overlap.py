"""Finds a stage's own ``overlapped_forward_backward``, through whatever wraps the module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["OverlapChoice", "find_overlapped"]

_NAME = "overlapped_forward_backward"
_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module")  # DDP and its like, compile, FSDP


@dataclass(frozen=True)
class OverlapChoice:
    """The function to call for a pair; or why none can be used although a stage has one."""

    function: Callable[..., Any] | None = None
    problem: str = ""


def find_overlapped(modules: Sequence[nn.Module]) -> OverlapChoice:
    """Finds the function that all of a rank's modules share, bound to their class."""
    owners = [_owner(module) for module in modules]
    classes = [None if owner is None else type(owner) for owner in owners]
    if all(cls is None for cls in classes):
        return OverlapChoice()
    if len(set(classes)) > 1:
        names = " and ".join("none" if cls is None else cls.__qualname__ for cls in classes)
        return OverlapChoice(
            problem=f"the stages' {_NAME} are of different classes ({names}) and cannot be used"
        )
    return OverlapChoice(function=getattr(classes[0], _NAME))


def _owner(module: nn.Module) -> nn.Module | None:
    """Returns the first module, going inwards through wrappers, whose class has the function."""
    current: Any = module
    while isinstance(current, nn.Module):
        if hasattr(type(current), _NAME):
            return current
        inner = [getattr(current, name) for name in _WRAPPED if hasattr(current, name)]
        current = next((candidate for candidate in inner if isinstance(candidate, nn.Module)), None)
    return None
