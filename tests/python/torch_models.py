"""Models made of the transformer layers of torch.nn."""

from __future__ import annotations

from typing import Any

import torch
from plain_models import CLASSES, TIME, VOCABULARY, WIDTH
from torch import Tensor, nn

_LAYER: dict[str, Any] = {
    "d_model": WIDTH,
    "nhead": 2,
    "dim_feedforward": 12,
    "dropout": 0.0,
    "batch_first": True,
}


class LanguageModel(nn.Module):
    """An encoder that has to find out that its mask is a causal one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(TIME, WIDTH)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**_LAYER), 4, nn.LayerNorm(WIDTH)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        x = self.embedding(text) + self.position(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        y: Tensor = self.head(self.encoder(x, mask))
        return y


class Translator(nn.Module):
    """An encoder of one text, and a decoder of another one, whose layers are the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(num_encoder_layers=1, num_decoder_layers=4, **_LAYER)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, source: Tensor, target: Tensor, present: Tensor) -> Tensor:
        hides = torch.ones(target.shape[1], target.shape[1]).triu(1).bool()
        decoded = self.transformer(
            self.embedding(source),
            self.embedding(target),
            tgt_mask=hides,
            src_key_padding_mask=present == 0,
            memory_key_padding_mask=present == 0,
        )
        y: Tensor = self.head(decoded.mean(1))
        return y
