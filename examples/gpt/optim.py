"""AdamW with a warm-up and a cosine, as GPTs are usually trained."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from gpt.options import Options


def build_optimizer(parameters: Iterable[nn.Parameter], options: Options) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves norms and biases alone."""
    by_kind: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        by_kind[parameter.dim() < 2].append(parameter)
    groups = [
        {"params": by_kind[0], "weight_decay": options.weight_decay},
        {"params": by_kind[1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))


def learning_rate(step: int, options: Options) -> float:
    """Return the rate of a step, counted from 0: linear warm-up, then a cosine down to a tenth."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))
