"""Shells: copies of a model's structure that share its parameters and lack some of its parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dualpipe_ext.adapters.own_calls import check_call

__all__ = ["BlockList", "Received", "Silent", "shell_of"]


def shell_of(
    model: nn.Module, replaced: Mapping[str, nn.Module | None], name: str = ""
) -> nn.Module:
    """Copies ``model`` with some submodules replaced; ``None`` removes one.

    Modules on the path to those places are copied; all others are shared.

    Args:
        model: the module to copy.
        replaced: what takes the place of submodules in the copy, by their names in ``model``.
        name: the name of ``model`` in the whole model, for errors.

    Raises:
        ValueError: the call of a copied module is not the forward of its class.
    """
    check_call(model, name)
    shell = model.__new__(type(model))
    # Leaves out a bound forward, which would run the model instead of the shell.
    shell.__dict__ = {key: value for key, value in vars(model).items() if key != "forward"}
    for table in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[table] = dict(model.__dict__[table])
    shell._non_persistent_buffers_set = set(model._non_persistent_buffers_set)
    below: dict[str, dict[str, nn.Module | None]] = defaultdict(dict)
    for place, module in replaced.items():
        child, _, rest = place.partition(".")
        below[child][rest] = module
    for child, places in below.items():
        if "" in places:
            shell._modules[child] = places[""]
        else:
            shell._modules[child] = shell_of(
                model.get_submodule(child), places, f"{name}.{child}" if name else child
            )
    return shell


class BlockList(nn.ModuleList):
    """Some blocks of a list, under the names that they have there, but indexed from 0."""

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, block in blocks.items():
            self.add_module(name, block)

    def __getitem__(self, index: int | slice) -> Any:
        """Returns the block at an index, or a list of several."""
        return list(self._modules.values())[index]


class Received(nn.Module):
    """Replaces the embedding, and returns what the previous stage sent."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor | None:
        """Returns what was received, whatever it is called with."""
        return self.value


class Silent(nn.Module):
    """Replaces an embedding that is added to another, by a zero, which changes no number."""

    def forward(self, positions: Tensor, **_: Any) -> Tensor:
        """Returns a zero, which can be added to anything."""
        return positions.new_zeros(())
