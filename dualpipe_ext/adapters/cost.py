"""What a layer or a stage costs."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from torch import nn

__all__ = ["Cost", "parameter_cost"]


@dataclass(frozen=True)
class Cost:
    """The time that a part of a model takes for one micro-batch, and the memory that it holds.

    Times and activations are 0 if they were not measured.

    Attributes:
        forward: seconds of F.
        backward_input: seconds of I, the backward for inputs.
        backward_weight: seconds of W, the backward for weights.
        num_parameters: the number of elements of its parameters; tied ones count in each part that
            has them.
        parameter_bytes: the size of its parameters.
        activation_bytes: the size of what a forward keeps for its backward. What two layers share
            (the output of one, the input of the other) counts in both.
    """

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    num_parameters: int = 0
    parameter_bytes: int = 0
    activation_bytes: int = 0

    @property
    def seconds(self) -> float:
        """F, I and W together."""
        return self.forward + self.backward_input + self.backward_weight

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def scaled(self, share: float) -> Cost:
        """Returns ``share`` of the times, without parameters and activations."""
        return Cost(share * self.forward, share * self.backward_input, share * self.backward_weight)

    def memory(self, num_stages: int) -> float:
        """Returns bytes in training: weights, gradients, two moments of Adam, and activations.

        A rank holds the activations of P+1 micro-batches, so each of its two stages holds
        those of (P+1)/2 on average.
        """
        return 4 * self.parameter_bytes + self.activation_bytes * (num_stages + 1) / 2


def parameter_cost(module: nn.Module) -> Cost:
    """Returns the cost of a module's parameters, without times and activations."""
    parameters = list(module.parameters())
    return Cost(
        num_parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )
