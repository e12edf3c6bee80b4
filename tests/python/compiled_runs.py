"""What the processes of test_compiled_layers.py run: importable by name, as they need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dualpipe_ext import TrainingWrapper, setup_dual_pipe

WIDTH = 8
NUM_LAYERS = 4
NUM_MICROBATCHES = 4
NUM_STEPS = 2

Memory = Literal["none", "activation_checkpoint", "offload"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(F.gelu(self.first(x)))
        return y


class Calls:
    """A backend that counts how often it compiles, and how often what it compiled is called."""

    def __init__(self) -> None:
        self.num_compiled = 0
        self.num_calls = 0

    def __call__(self, module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        self.num_compiled += 1

        def call(*inputs: Any) -> Any:
            self.num_calls += 1
            return module.forward(*inputs)

        return call


def train(
    rank: int, size: int, memory: Memory, when: str
) -> tuple[list[float], tuple[float, float]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(NUM_LAYERS)))
    calls = Calls()
    if when == "before":
        for layer in model:
            layer.compile(backend=calls)
    config = setup_dual_pipe(model, num_stages=size)
    config = replace(config, memory_optimization=memory, num_microbatches=NUM_MICROBATCHES)
    training = TrainingWrapper(model, config, loss_fn=F.mse_loss)
    if when == "after":
        for layer in training.pipeline.modules():
            if isinstance(layer, Layer):
                layer.compile(backend=calls)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))
    losses = [float(training.train_step((x, x.sin()))) for _ in range(NUM_STEPS)]
    per_layer = NUM_LAYERS * NUM_STEPS
    trained = calls.num_calls / per_layer
    return [*losses, float(training.evaluate((x, x.cos())))], (calls.num_compiled, trained)
