"""Small random models of Hugging Face's architectures, with data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from models import Microbatch
from torch import Tensor, nn

VOCABULARY = 32
TIME = 8
CLASSES = 3
WINDOW = 3  # of sliding attention

_text = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_decoder = {**_text, "num_key_value_heads": 1, "head_dim": 8}
_windows = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
_gpt2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 2,
    "n_positions": 16,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_bert = {**_text, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_vit: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": CLASSES,
}
_deepseek = {
    **_text,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_moe = {
    **_decoder,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
_mixed_attention = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def next_token(logits: Tensor, target: Tensor) -> Tensor:
    """Targets below 0 are padding."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)


def of_class(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def two_outputs(hidden: Tensor, pooled: Tensor, target: Tensor) -> Tensor:
    """What a model without a head returns."""
    return next_token(hidden, target.clamp(max=15)) + pooled.square().mean()


def _separate_experts(model: nn.Module) -> None:
    """Gates that differ by more than rounding: as initialized, two experts tie for some tokens, and
    which of them is chosen, and with it the loss, then hangs on the order of a sum."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == "gate":
                module.weight *= 8.0


@dataclass(frozen=True)
class Architecture:
    """A model's class, its configuration, and what it is trained for."""

    model: str
    config: str
    settings: dict[str, Any]
    criterion: Callable[..., Tensor] = next_token
    tied: bool = False

    def make(self, device: str = "cpu", **settings: Any) -> nn.Module:
        """The same numbers every time."""
        config = getattr(hf, self.config)(**{**self.settings, **settings})
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(5)
            model: nn.Module = getattr(hf, self.model)(config)
        _separate_experts(model)
        return model

    @property
    def is_vision(self) -> bool:
        return self.config == "ViTConfig"

    def inputs(self, rows: int, seed: int = 0) -> dict[str, Tensor]:
        """Text padded on the left and on the right, or pictures."""
        generator = torch.Generator().manual_seed(seed)
        if self.is_vision:
            return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
        mask = torch.ones(rows, TIME, dtype=torch.long)
        mask[0, -3:] = 0
        if rows > 1:
            mask[1, :2] = 0
        tokens = torch.randint(3, VOCABULARY, (rows, TIME), generator=generator)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": tokens * mask, "attention_mask": mask, "position_ids": positions}

    def microbatch(self, rows: int, names: tuple[str, ...], seed: int) -> Microbatch:
        inputs = self.inputs(rows, seed)
        if self.criterion is of_class:
            labels = torch.arange(rows) % CLASSES
        else:
            tokens = inputs["input_ids"]
            labels = tokens.masked_fill(inputs["attention_mask"] == 0, -100)
        return Microbatch(tuple(inputs.get(name) for name in names), (labels,))


ARCHITECTURES = {
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", _gpt2, tied=True),
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", _decoder),
    "mistral": Architecture(
        "MistralForCausalLM", "MistralConfig", {**_decoder, "sliding_window": WINDOW}
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", {**_decoder, **_windows}),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {**_decoder, **_windows}),
    "gemma": Architecture("GemmaForCausalLM", "GemmaConfig", _decoder, tied=True),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", "Gemma2Config", {**_decoder, "sliding_window": WINDOW}, tied=True
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_decoder, "sliding_window": WINDOW, "layer_types": _mixed_attention},
        tied=True,
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_decoder, "num_local_experts": 4, "sliding_window": WINDOW},
    ),
    "deepseek_v3": Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", _deepseek),
    "bert": Architecture("BertForMaskedLM", "BertConfig", _bert, tied=True),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", _vit, of_class),
}

OTHERS_LIKE_THEM = {
    "llama backbone": Architecture("LlamaModel", "LlamaConfig", _decoder),
    "gpt2 backbone": Architecture("GPT2Model", "GPT2Config", _gpt2),
    "bert with a pooler": Architecture("BertModel", "BertConfig", _bert, two_outputs),
    "vit with a pooler": Architecture("ViTModel", "ViTConfig", _vit),
    "llama classifier": Architecture("LlamaForSequenceClassification", "LlamaConfig", _decoder),
    "gpt2 classifier": Architecture("GPT2ForSequenceClassification", "GPT2Config", _gpt2),
    "bert classifier": Architecture("BertForSequenceClassification", "BertConfig", _bert),
    "bert decoder": Architecture("BertLMHeadModel", "BertConfig", {**_bert, "is_decoder": True}),
    "bert decoder backbone": Architecture(
        "BertModel", "BertConfig", {**_bert, "is_decoder": True}, two_outputs
    ),
    "olmo2": Architecture("Olmo2ForCausalLM", "Olmo2Config", _decoder),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", _decoder),
    "qwen2_moe": Architecture("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _moe),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _moe),
}
