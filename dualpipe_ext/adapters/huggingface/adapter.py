"""Hugging Face models: each stage runs the model's own forward with its share of the blocks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_ext.adapters.base import ModelAdapterBase
from dualpipe_ext.adapters.first_call import check_number_of_inputs
from dualpipe_ext.adapters.huggingface.families import FAMILIES, Family
from dualpipe_ext.adapters.plan import Stage
from dualpipe_ext.adapters.shell import BlockList, Received, shell_of

__all__ = ["HuggingFaceAdapter"]

_EXTRA_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


class HuggingFaceAdapter(ModelAdapterBase):
    """For a transformers model, whose parts have the names that its family says.

    Every stage runs the forward of the model's backbone (the last one, that of the whole model) on
    a copy of the structure in which the list of blocks holds only its own. What comes before the
    blocks returns what the previous stage sent; what comes after them passes it through. Each stage
    computes attention masks and rotary tables from the masks and positions that travel with the
    hidden states: the model's own code makes them, with the same bits as in the unsplit model.

    Args:
        model: a transformers model.
        family: the names of its parts; by default those of its model type.

    Raises:
        ValueError: an unknown model type, a model without the family's parts, or one that is
            configured to return more than stages pass on.
    """

    def __init__(self, model: nn.Module, family: Family | None = None) -> None:
        super().__init__(model)
        self.family = family or _family_of(model)
        self._backbone, self._blocks = self._find_blocks()
        self._refuse_extra_outputs()

    @property
    def layers(self) -> list[str]:
        """The names of the blocks."""
        name = self._in_model(self._blocks)
        return [f"{name}.{child}" for child, _ in self._block_list().named_children()]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arguments of the model's forward that the first stage takes."""
        return self.family.inputs

    def sample_inputs(self) -> tuple[Tensor | None, ...]:
        """Returns one row: 128 tokens (or as many as the model takes), or an image of its size."""
        config: Any = self.model.config
        device = next(self.model.parameters()).device
        if self.family.main_input == "pixel_values":
            size = config.image_size
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            return (torch.zeros(1, config.num_channels, height, width, device=device),)
        length = min(128, config.max_position_embeddings)
        tokens = torch.arange(length, device=device)[None] % config.vocab_size
        return (tokens, *([None] * (len(self.inputs) - 1)))

    def cut(self, stages: Sequence[range]) -> list[Stage]:
        """Cuts the model between blocks."""
        return [self._stage(own, s == 0, s == len(stages) - 1) for s, own in enumerate(stages)]

    def _stage(self, own: range, first: bool, last: bool) -> Stage:
        blocks = list(self._block_list().named_children())
        replaced: dict[str, nn.Module | None] = {
            self._in_model(self._blocks): BlockList({blocks[i][0]: blocks[i][1] for i in own})
        }
        if not first:
            replaced |= self._stand_ins(self.family.entry)
        if not last:
            replaced |= self._stand_ins(self.family.exit)
            if self._backbone:
                others = [name for name, _ in self.model.named_children()]
                replaced |= {name: None for name in others if name != self._backbone}
        shell = shell_of(self.model, replaced)
        inner: Any = shell.get_submodule(self._backbone)
        inner.config = self._stage_config(inner.config, own, first)
        return Stage(shell, self._forward(first, last))

    def _forward(self, first: bool, last: bool) -> _StageForward:
        family = self.family
        takes = _taken_by(self.model if last else self.model.get_submodule(self._backbone))
        received = next(name for name, kind in family.entry.items() if issubclass(kind, Received))
        return _StageForward(
            backbone=self._backbone,
            blocks=self._in_model(self._blocks),
            received="" if first else self._in_model(received),
            last=last,
            inputs=family.inputs if first else family.carried,
            carried=family.carried,
            main_input=family.main_input,
            options=tuple((name, value) for name, value in family.options.items() if takes(name)),
        )

    def _stage_config(self, config: Any, own: range, first: bool) -> Any:
        """Returns the settings of a stage's backbone, which counts its own layers from 0."""
        config = copy.copy(config)
        settings = vars(config)
        if settings.get("layer_types") is not None:
            settings["layer_types"] = [settings["layer_types"][i] for i in own]
        if not first:
            settings.update(self.family.later_config)
        return config

    def _stand_ins(
        self, kinds: Mapping[str, type[nn.Module] | None]
    ) -> dict[str, nn.Module | None]:
        return {
            self._in_model(name): None if kind is None else kind()
            for name, kind in kinds.items()
            if _has(self.model, self._in_model(name))
        }

    def _find_blocks(self) -> tuple[str, str]:
        """Finds the backbone's name in the model (empty for the model), and the blocks' in that."""
        for backbone in (str(getattr(self.model, "base_model_prefix", "")), "model", ""):
            for blocks in self.family.blocks:
                if _has(self.model, _join(backbone, blocks)):
                    return backbone, blocks
        raise ValueError(
            f"{type(self.model).__name__} has no {' or '.join(self.family.blocks)} in its backbone, "
            f"as others of its model type have; register an adapter for it with "
            f"dualpipe_ext.adapters.register_adapter"
        )

    def _in_model(self, name: str) -> str:
        return _join(self._backbone, name)

    def _block_list(self) -> nn.Module:
        return self.model.get_submodule(self._in_model(self._blocks))

    def _refuse_extra_outputs(self) -> None:
        for name in _EXTRA_OUTPUTS:
            if getattr(self.model.config, name, False):
                raise ValueError(
                    f"config.{name} is set, which asks for something of every layer, and stages "
                    f"do not send that on: the model would train otherwise than in one piece; set "
                    f"model.config.{name} = False"
                )


@dataclass(frozen=True)
class _StageForward:
    """The forward of one stage. Holds only names, so that a partition can be copied."""

    backbone: str  # is called, except in the last stage, which calls the whole model
    blocks: str
    received: str  # the stand-in that returns the received hidden states; empty in the first stage
    last: bool
    inputs: tuple[str, ...]
    carried: tuple[str, ...]
    main_input: str
    options: tuple[tuple[str, Any], ...]

    def __call__(self, shell: nn.Module, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        if not self.received:
            return self._run(shell, self._named(tensors))
        hidden, *carried = tensors
        given = dict(zip(self.inputs, carried, strict=True))
        if self.main_input:
            given[self.main_input] = hidden
        stand_in: Any = shell.get_submodule(self.received)
        stand_in.value = hidden
        try:
            return self._run(shell, given)
        finally:
            stand_in.value = None

    def _named(self, tensors: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        check_number_of_inputs(tensors, self.inputs)
        return dict(zip(self.inputs, tensors, strict=False))

    def _run(self, shell: nn.Module, given: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        self._check_attention(shell)
        present = {name: tensor for name, tensor in given.items() if tensor is not None}
        target = "" if self.last else self.backbone
        output = shell.get_submodule(target)(**present, **dict(self.options), return_dict=True)
        if self.last:
            return tuple(output.to_tuple())
        return (output[0], *(given.get(name) for name in self.carried))

    def _check_attention(self, shell: nn.Module) -> None:
        """Raises if the attention was changed after cutting.

        The stage's backbone makes masks for the blocks, but these use the whole model's settings.
        """
        cut_with = _attention(shell.get_submodule(self.backbone))
        blocks = shell.get_submodule(self.blocks)
        found = next((_attention(m) for m in blocks.modules() if hasattr(m, "config")), cut_with)
        if found != cut_with:
            raise ValueError(
                f"the model was cut with attention {cut_with!r} and computes {found!r} now, for "
                f"which its stages make no masks: call set_attn_implementation({found!r}) before "
                f"the model is cut, or set_attn_implementation({cut_with!r}) again"
            )


def _family_of(model: nn.Module) -> Family:
    config: Any = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        kind = type(model).__name__
        raise ValueError(
            f"there is no adapter for {kind} (model type {config.model_type!r}); known types are "
            f"{', '.join(FAMILIES)}; register one with "
            f"dualpipe_ext.adapters.register_adapter({kind}), such as a HuggingFaceAdapter with a "
            f"Family that names the model's parts (dualpipe_ext.adapters.huggingface)"
        )
    return family


def _taken_by(module: nn.Module) -> Callable[[str], bool]:
    """Returns a function that says whether the module's forward takes an argument of some name."""
    arguments = inspect.signature(module.forward).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in arguments.values())
    return lambda name: takes_any or name in arguments


def _attention(module: Any) -> Any:
    """Returns the implementation of attention that a module is configured with."""
    return module.config._attn_implementation


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module has this submodule."""
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True
