"""The families of Hugging Face models, and the names of their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import nn

from dualpipe_ext.adapters.shell import Received, Silent

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """The names of the parts of a model, relative to its backbone.

    Attributes:
        blocks: the list of blocks; several names if versions of transformers differ.
        entry: what comes before the blocks, and what replaces it in later stages. One of these is a
            :class:`~dualpipe_ext.adapters.shell.Received`.
        exit: what comes after the blocks, and what replaces it in earlier stages; ``None``:
            nothing.
        inputs: what the first stage takes: arguments of the model's forward.
        carried: the inputs that travel to all stages.
        main_input: the argument that received hidden states are also passed as, for a model that
            requires an input and none of those carried will do.
        options: further arguments of forwards, for those that take them.
        later_config: settings of the backbone that differ in later stages.
    """

    blocks: tuple[str, ...]
    entry: Mapping[str, type[nn.Module]]
    exit: Mapping[str, type[nn.Module] | None]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids")
    carried: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids")
    main_input: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    later_config: Mapping[str, Any] = field(default_factory=dict)


class ReceivedPatches(Received):
    """Replaces the embedding of patches, which the model asks for its dtype."""

    @property
    def patch_embeddings(self) -> SimpleNamespace:
        """Leads to a tensor with the dtype of what was received."""
        return SimpleNamespace(projection=SimpleNamespace(weight=self.value))


_DECODER = Family(
    blocks=("layers",),
    entry={"embed_tokens": Received},
    exit={"norm": nn.Identity},
    options={"use_cache": False},
    # Gemmas in transformers 4 scale what enters by the root of this; what is received is scaled.
    later_config={"hidden_size": 1},
)
_GPT2 = Family(
    blocks=("h",),
    entry={"wte": Received, "wpe": Silent, "drop": nn.Identity},
    exit={"ln_f": nn.Identity},
    inputs=("input_ids", "attention_mask", "position_ids", "token_type_ids"),
    options={"use_cache": False},
)
_BERT = Family(
    blocks=("encoder.layer",),
    entry={"embeddings": Received},
    exit={"pooler": None},
    inputs=("input_ids", "attention_mask", "token_type_ids", "position_ids"),
    carried=("input_ids", "attention_mask"),
    options={"use_cache": False},  # for those that are decoders
)
_VIT = Family(
    blocks=("layers", "encoder.layer"),
    entry={"embeddings": ReceivedPatches},
    exit={"layernorm": nn.Identity, "pooler": None},
    inputs=("pixel_values",),
    carried=(),
    main_input="pixel_values",
)

FAMILIES: Mapping[str, Family] = {  # by the model type that a configuration names
    "bert": _BERT,
    "deepseek_v3": _DECODER,
    "gemma": _DECODER,
    "gemma2": _DECODER,
    "gemma3_text": _DECODER,
    "gpt2": _GPT2,
    "llama": _DECODER,
    "mistral": _DECODER,
    "mixtral": _DECODER,
    "olmo2": _DECODER,
    "phi3": _DECODER,
    "qwen2": _DECODER,
    "qwen2_moe": _DECODER,
    "qwen3": _DECODER,
    "qwen3_moe": _DECODER,
    "vit": _VIT,
}
