"""Models with a list of blocks, cut by following their own forward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property

from torch import nn

from dualpipe_ext.adapters.base import ModelAdapterBase
from dualpipe_ext.adapters.find_layers import layers_in, lists_of_blocks
from dualpipe_ext.adapters.pieces import TracedModel
from dualpipe_ext.adapters.plan import Stage

__all__ = ["TransformerLayerAdapter"]


class TransformerLayerAdapter(ModelAdapterBase):
    """For any model whose forward runs a list of blocks one after the other.

    The forward is traced once, with each block as one step, and cut after blocks: what it does
    before, between and after them is kept, and what later stages use travels to them. Between
    blocks it must not decide by the values of tensors; within them it may do anything.

    Args:
        model: the model to cut.
        blocks: the name of the list in the model, or of several in the order in which they run; by
            default the lists whose elements are of the one class that has the most parameters.
        inputs: the arguments of the forward that stages take; by default those without a default.

    Raises:
        ValueError: there is no such list.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: str | Sequence[str] | None = None,
        inputs: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model)
        if blocks is None:
            self._lists = self._find(model)
        else:
            self._lists = [blocks] if isinstance(blocks, str) else list(blocks)
        self._inputs = _required(model) if inputs is None else tuple(inputs)

    @property
    def layers(self) -> list[str]:
        """The names of the blocks."""
        return layers_in(self.model, self._lists)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arguments of the model's forward that the first stage takes."""
        return self._inputs

    def parts(self) -> list[range]:
        """Returns the blocks; those that a skip connection bypasses stay together."""
        return self._traced.parts()

    def cut(self, stages: Sequence[range]) -> list[Stage]:
        """Cuts the model after blocks."""
        return self._traced.cut(stages)

    @cached_property
    def _traced(self) -> TracedModel:
        return TracedModel(self.model, self.layers, self.inputs)

    def _find(self, model: nn.Module) -> list[str]:
        lists = lists_of_blocks(model)
        if not lists:
            kind = type(model).__name__
            raise ValueError(
                f"{kind} has no list of blocks (nn.ModuleList or nn.Sequential with modules of one "
                f"class); name them with TransformerLayerAdapter(model, blocks=...), or register "
                f"an adapter for {kind} with dualpipe_ext.adapters.register_adapter"
            )
        return lists


def _required(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )
