"""Writing text with a trained model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gpt.model import GPTConfig, GPTStage


@torch.no_grad()
def sample(
    weights: Mapping[str, Tensor],
    config: GPTConfig,
    prompt: str,
    length: int,
    temperature: float = 0.7,
    seed: int = 0,
) -> str:
    """Continue ``prompt`` by ``length`` bytes with the unsplit model.

    Args:
        weights: The whole model's, by name.
        config: Its shape.
        prompt: What the text starts with.
        length: Bytes to add.
        temperature: Below 1 prefers what is likely.
        seed: Of the draws.
    """
    model = GPTStage(config, range(config.layers))
    model.load_state_dict(dict(weights))
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt.encode())
    for _ in range(length):
        logits = model(torch.tensor([text[-config.context :]]))[0, -1]
        odds = torch.softmax(logits / temperature, dim=0)
        text.append(int(torch.multinomial(odds, 1, generator=generator)))
    return bytes(text).decode(errors="replace")
