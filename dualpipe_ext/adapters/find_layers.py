"""Finds the layers of a model that has no description."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["layers_in", "lists_of_blocks"]

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def lists_of_blocks(model: nn.Module) -> list[str]:
    """Returns the names of the lists that hold the model's blocks: modules of one class.

    They must have parameters. If there are several classes of blocks, the one with the most
    parameters is chosen. A list within a block (its experts, say) does not count.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _LISTS) and _block_class(module) is not None
    ]
    outer = [(name, module) for name, module in lists if not _is_below(name, lists)]
    sizes: dict[type[nn.Module], int] = {}
    for _, module in outer:
        kind = _block_class(module)
        assert kind is not None
        sizes[kind] = sizes.get(kind, 0) + sum(p.numel() for p in module.parameters())
    if not sizes:
        return [""] if isinstance(model, nn.Sequential) else []
    largest = max(sizes, key=lambda kind: sizes[kind])
    return [name for name, module in outer if _block_class(module) is largest]


def layers_in(model: nn.Module, lists: list[str]) -> list[str]:
    """Returns the names of the elements of some lists."""
    return [
        f"{name}.{child}" if name else child
        for name in lists
        for child, _ in model.get_submodule(name).named_children()
    ]


def _block_class(module: nn.Module) -> type[nn.Module] | None:
    classes = {type(child) for child in module.children()}
    if len(classes) != 1 or not any(True for _ in module.parameters()):
        return None
    (kind,) = classes
    if not issubclass(kind, _LISTS):
        return kind
    if not issubclass(kind, nn.Sequential):
        return None
    # Stacks of different layers are blocks. Those of equal ones are lists of blocks themselves.
    return kind if all(_block_class(child) is None for child in module.children()) else None


def _is_below(name: str, lists: Sequence[tuple[str, nn.Module]]) -> bool:
    return any(name != other and name.startswith(_prefix(other)) for other, _ in lists)


def _prefix(name: str) -> str:
    return f"{name}." if name else ""
