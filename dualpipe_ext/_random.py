"""Random numbers within steps: a seed for each forward of a micro-batch."""

from __future__ import annotations

import torch

__all__ = ["microbatch_seed", "seed_generators"]


def microbatch_seed(seed: int, step: int, stage: int, microbatch: int) -> int:
    """Returns the seed of a stage's forward of a micro-batch, under ``DualPipeConfig(seed=...)``.

    The arguments are mixed so that similar ones give unrelated streams (SplitMix64's finalizer;
    Steele, Lea and Flood, 2014). ``step`` counts the calls of ``step()``, from 1.
    """
    mask = (1 << 64) - 1
    value = seed & mask
    for number in (step, stage, microbatch):
        value = (value + 0x9E3779B97F4A7C15 + number) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value >> 1


def seed_generators(device: torch.device, seed: int) -> None:
    """Seeds the generators that a rank draws from: the host's and its GPU's, and no other GPU's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
