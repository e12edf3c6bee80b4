"""Forwards of torch.nn's stacks of layers that can be traced: theirs decide by values of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

__all__ = ["is_causal_mask", "traceable_stacks"]


@contextmanager
def traceable_stacks() -> Iterator[None]:
    """Makes ``nn.TransformerEncoder`` and ``nn.TransformerDecoder`` run their layers one by one.

    They compute what they compute in training. What they do in inference alone is left out: to
    skip padding by nested tensors, which leaves zeros where padding was.
    """
    with (
        mock.patch.object(nn.TransformerEncoder, "forward", _encode),
        mock.patch.object(nn.TransformerDecoder, "forward", _decode),
    ):
        yield


def is_causal_mask(mask: Tensor, queries: Tensor, batch_first: bool) -> bool:
    """Whether an attention mask hides from each position the later ones and nothing else.

    Args:
        mask: of any shape; boolean (True hides) or floating-point (added to the scores).
        queries: [sequence, features], or with the batch, which comes first or second.
        batch_first: whether the batch comes first.
    """
    size = queries.shape[1 if batch_first and queries.dim() > 2 else 0]
    if tuple(mask.shape) != (size, size):
        return False
    hides = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
    causal = hides if mask.dtype == torch.bool else _as_added(hides, mask.dtype)
    return torch.equal(mask, causal)


def _as_added(hides: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(hides, dtype=dtype).masked_fill(hides, float("-inf"))


def _encode(
    self: Any,
    src: fx.Proxy,
    mask: fx.Proxy | None = None,
    src_key_padding_mask: fx.Proxy | None = None,
    is_causal: bool | None = None,
) -> fx.Proxy:
    output = src
    causal = _causal(self, mask, is_causal, src)
    for layer in self.layers:
        output = layer(
            output,
            src_mask=mask,
            is_causal=causal,
            src_key_padding_mask=src_key_padding_mask,
        )
    return output if self.norm is None else self.norm(output)


def _decode(
    self: Any,
    tgt: fx.Proxy,
    memory: fx.Proxy,
    tgt_mask: fx.Proxy | None = None,
    memory_mask: fx.Proxy | None = None,
    tgt_key_padding_mask: fx.Proxy | None = None,
    memory_key_padding_mask: fx.Proxy | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> fx.Proxy:
    output = tgt
    causal = _causal(self, tgt_mask, tgt_is_causal, tgt)
    for layer in self.layers:
        output = layer(
            output,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=causal,
            memory_is_causal=memory_is_causal,
        )
    return output if self.norm is None else self.norm(output)


def _causal(
    stack: Any, mask: fx.Proxy | Tensor | None, is_causal: bool | None, queries: fx.Proxy
) -> bool | fx.Proxy:
    if is_causal is not None or mask is None:
        return bool(is_causal)
    arguments = (mask, queries, stack.layers[0].self_attn.batch_first)
    return queries.tracer.create_proxy("call_function", is_causal_mask, arguments, {})
