"""Finds the adapter of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from dualpipe_ext.adapters.base import ModelAdapterBase
from dualpipe_ext.adapters.huggingface import HuggingFaceAdapter
from dualpipe_ext.adapters.own_calls import check_call
from dualpipe_ext.adapters.transformer import TransformerLayerAdapter
from dualpipe_ext.adapters.vision import VisionModelAdapter

__all__ = ["get_model_adapter", "register_adapter"]

AdapterClass = TypeVar("AdapterClass", bound=Callable[[nn.Module], ModelAdapterBase])

_registered: dict[type[nn.Module], Callable[[nn.Module], ModelAdapterBase]] = {}


def register_adapter(model_class: type[nn.Module]) -> Callable[[AdapterClass], AdapterClass]:
    """Registers an adapter for a class of models and its subclasses.

    ::

        @register_adapter(MyModel)
        class MyAdapter(ModelAdapterBase): ...

        register_adapter(Other)(lambda model: TransformerLayerAdapter(model, blocks="body.layers"))

    Args:
        model_class: a class of modules. If it is registered again, the later adapter is used.

    Returns:
        A decorator for an adapter's class, or for a function that returns a model's adapter.
    """

    def register(adapter: AdapterClass) -> AdapterClass:
        _registered[model_class] = adapter
        return adapter

    return register


def get_model_adapter(model: nn.Module) -> ModelAdapterBase:
    """Returns the adapter for a model: a registered one, or the one for its architecture.

    Raises:
        ValueError: no adapter knows the architecture (the message says how to register one), or a
            call of the model is more than the forward of its class.
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be an nn.Module; found {type(model).__name__}")
    for kind in type(model).__mro__:
        if kind in _registered:
            return _registered[kind](model)
    check_call(model)
    if _is_huggingface(model):
        return HuggingFaceAdapter(model)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return VisionModelAdapter(model)
    return TransformerLayerAdapter(model)


def _is_huggingface(model: nn.Module) -> bool:
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    )
