"""A small GPT whose stages are ordinary modules, named as in the whole model."""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Attributes:
        vocab_size: Number of tokens; 256 for bytes.
        context: Longest sequence, in tokens.
        layers: Number of transformer blocks.
        width: Size of the residual stream.
        heads: Attention heads of a block; divides ``width``.
    """

    vocab_size: int = 256
    context: int = 64
    layers: int = 8
    width: int = 128
    heads: int = 4


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape; a token sees itself and earlier ones."""
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return y


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU network of four times the width."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class Embedding(nn.Module):
    """Token plus position embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, time) token ids to (batch, time, width)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        y: Tensor = self.token(tokens) + self.position(positions)
        return y


class Head(nn.Module):
    """Final norm and the projection to logits."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.logits = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to (batch, time, vocab_size)."""
        y: Tensor = self.logits(self.norm(x))
        return y


class GPTStage(nn.Module):
    """Some consecutive blocks of a GPT, with the embedding before or the head after them.

    Parameters keep the name they have in the whole model, and their initial values depend on
    that name and the seed only: however the model is cut, it starts the same.
    """

    def __init__(self, config: GPTConfig, blocks: range, seed: int = 0) -> None:
        super().__init__()
        self.embedding = Embedding(config) if blocks.start == 0 else None
        self.blocks = nn.ModuleDict({str(layer): Block(config) for layer in blocks})
        self.head = Head(config) if blocks.stop == config.layers else None
        initialize(self, config, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (first stage) or activations to activations or logits (last stage)."""
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x)


def even_cut(layers: int, num_stages: int) -> list[range]:
    """Return which blocks each stage holds, as evenly as whole blocks allow."""
    edges = [layers * stage // num_stages for stage in range(num_stages + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def initialize(stage: GPTStage, config: GPTConfig, seed: int) -> None:
    """Draw weights from a normal distribution, smaller where a block writes to the residual."""
    for name, parameter in stage.named_parameters():
        generator = torch.Generator().manual_seed(seed ^ stable_hash(name))
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            std = initial_std(name, parameter.shape[1], config.layers)
            nn.init.normal_(parameter, std=std, generator=generator)


def initial_std(name: str, fan_in: int, layers: int) -> float:
    """Return the standard deviation of a weight matrix at the start."""
    if name.startswith("embedding"):
        return 0.1
    if name.startswith("head"):
        return 0.02  # logits near zero: the first loss is that of a uniform guess
    if name.endswith(("attention.out.weight", "mlp.2.weight")):
        return 0.5 / math.sqrt(fan_in * 2 * layers)  # the residual adds up 2 * layers of them
    return 0.5 / math.sqrt(fan_in)


def stable_hash(text: str) -> int:
    """Hash text to 32 bits, the same in every process and on every machine (FNV-1a)."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
