"""Checks what the first stage of a model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from dualpipe_ext.adapters.plan import Outputs

__all__ = ["FirstCall", "check_number_of_inputs"]


def check_number_of_inputs(
    tensors: Sequence[Tensor | None], inputs: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """Raises if there are more tensors than inputs.

    Args:
        tensors: the tensors that were given.
        inputs: the arguments that the model takes, in order.
        optional: the arguments that it would take if an adapter passed them on.

    Raises:
        ValueError: says what the model takes, and how to pass more.
    """
    if len(tensors) <= len(inputs):
        return
    more = (*inputs, *optional)[: len(tensors)]
    remedy = f"; cut it with TransformerLayerAdapter(model, inputs={more!r}) to pass more"
    raise ValueError(
        f"{len(tensors)} inputs were given to step(); this model takes "
        f"{', '.join(inputs)}, in this order{remedy if optional else ''}"
    )


@dataclass(frozen=True)
class FirstCall:
    """The forward of the first stage of a model that was traced.

    Attributes:
        kind: the name of the model's class.
        inputs: the arguments that it takes, in order.
        unused: those of them that no operation used in the trace.
        optional: arguments of the model's forward that kept their defaults.
    """

    kind: str
    inputs: tuple[str, ...]
    unused: frozenset[str]
    optional: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, graph: fx.Graph) -> FirstCall:
        """Makes the forward of a model's first stage, from its trace."""
        nodes = [node for node in graph.nodes if node.op == "placeholder"]
        inputs = tuple(str(node.target) for node in nodes)
        return cls(
            kind=type(model).__name__,
            inputs=inputs,
            unused=frozenset(str(node.target) for node in nodes if not node.users),
            optional=tuple(name for name in _arguments(model) if name not in inputs),
        )

    def __call__(self, module: nn.Module, *tensors: Tensor | None) -> Outputs:
        """Runs the stage.

        Raises:
            ValueError: there are more inputs than it takes, or one that it would ignore.
        """
        check_number_of_inputs(tensors, self.inputs, self.optional)
        for name, tensor in zip(self.inputs, tensors, strict=False):
            if tensor is not None and name in self.unused:
                raise ValueError(
                    f"{name} was given, and the forward of {self.kind} did nothing with it when it "
                    f"was traced, where stand-ins are no tensors: in place of isinstance({name}, "
                    f"Tensor) ask `{name} is not None`; if the forward ignores it anyhow, pass None"
                )
        returned: Outputs = module(*tensors)
        return returned


def _arguments(model: nn.Module) -> list[str]:
    """Returns the arguments that a model's forward takes by name."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
