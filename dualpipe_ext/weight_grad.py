"""Deferred weight gradients: layers that defer natively, and a store for functions that do it."""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from dualpipe_ext import _C
from dualpipe_ext._deferred_forward import DeferredForward
from dualpipe_ext.weight_report import WeightSplitReport, can_defer_natively, weight_split

__all__ = [
    "WeightGradStore",
    "WeightSplitReport",
    "defer_weight_gradients",
    "undo_defer_weight_gradients",
    "weight_split",
]


def defer_weight_gradients(module: nn.Module) -> WeightSplitReport:
    """Make the linear layers of a module leave their weight gradients to the engine.

    Every ``nn.Linear`` and every ``Conv1D`` of transformers below ``module`` gets a ``forward`` of
    its own, which computes the same bits. In a step of the engine the backward pass for inputs (I)
    then skips the gradients of weight and bias, and the pass for weights (W) adds them in place to
    ``.grad``, or to ``main_grad`` where the parameter has one. Outside of a step nothing changes.
    Parameters, their names and hooks, and the hooks of modules stay as they are; a deep copy
    defers as well, an unpickled one does not. Calling it twice is harmless.

    Args:
        module: Any module, changed in place.

    Returns:
        Which weights are deferred, which may be, which are not, and why.
    """
    for layer in module.modules():
        if can_defer_natively(layer):
            layer.__dict__["forward"] = DeferredForward(layer)
    return weight_split(module)


def undo_defer_weight_gradients(module: nn.Module) -> None:
    """Give every layer that :func:`defer_weight_gradients` changed its own ``forward`` back."""
    for layer in module.modules():
        if isinstance(layer.__dict__.get("forward"), DeferredForward):
            del layer.__dict__["forward"]


Function = Callable[[], object]

_TLS_KEY = "dualpipe_ext.WeightGradStore"


@dataclass
class _ThreadStore:
    """The store of a thread that no engine is working on."""

    enabled: bool = False
    cache: list[Function] = field(default_factory=list)
    groups: deque[list[Function]] = field(default_factory=deque)


def _thread_store() -> _ThreadStore:
    # Torch's own thread-local state: autograd's threads see what the thread that called it has.
    if not torch._C._is_key_in_tls(_TLS_KEY):
        _stash(_ThreadStore())
    store = torch._C._get_obj_in_tls(_TLS_KEY)
    assert isinstance(store, _ThreadStore)
    return store


def _stash(store: _ThreadStore) -> None:
    num_references = sys.getrefcount(store)
    torch._C._stash_obj_in_tls(_TLS_KEY, store)
    if sys.getrefcount(store) == num_references:
        # torch 2.11 gives back, when the thread ends, a reference that it never took.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))


class _StoreType(type):
    """Makes ``enabled`` a property of the class."""

    @property
    def enabled(cls) -> bool:
        """Whether a backward function should ``put`` its weight gradient, not compute it.

        True in the passes of an engine that defer (I). Without an engine it is what this thread
        assigned last, False at first.
        """
        queue = _C.current_weight_queue()
        return (queue is not None and queue.deferring) or _thread_store().enabled

    @enabled.setter
    def enabled(cls, value: bool) -> None:
        _thread_store().enabled = bool(value)


class WeightGradStore(metaclass=_StoreType):
    """Where a backward function of your own leaves its weight gradient for later.

    In an ``autograd.Function``'s backward, test ``WeightGradStore.enabled`` and hand ``put`` a
    function that adds the weight gradient. The engine calls it in the W of that stage and
    micro-batch, without gradients; what it raises is raised by the step. On CUDA a backward runs in
    autograd's threads, and the function in the engine's.

    The class holds no state. In an engine's step it stands for that engine's queue; elsewhere for a
    store of the calling thread, which you flush and pop yourself::

        WeightGradStore.enabled = True
        loss.backward()  # functions are put
        WeightGradStore.enabled = False
        WeightGradStore.flush()  # one group
        WeightGradStore.pop()  # runs the oldest group
    """

    @classmethod
    def put(cls, function: Function) -> None:
        """Keep a function for later; call it now where the engine's pass does not defer.

        Raises:
            TypeError: It cannot be called.
        """
        if not callable(function):
            raise TypeError(
                f"WeightGradStore.put was given a {type(function).__name__}; give it a function "
                "without arguments that computes a weight gradient"
            )
        queue = _C.current_weight_queue()
        store = _thread_store()
        if queue is not None and queue.deferring:
            queue.put(function)
        elif queue is None or store.enabled:
            store.cache.append(function)
        else:
            _call_all([function])

    @classmethod
    def flush(cls) -> None:
        """Make the functions put since the last flush one group, which may be empty."""
        store = _thread_store()
        store.groups.append(store.cache)
        store.cache = []

    @classmethod
    def pop(cls) -> None:
        """Call the functions of the oldest group, in order, and forget them.

        Raises:
            ValueError: There is no group.
        """
        groups = _thread_store().groups
        if not groups:
            raise ValueError(
                "WeightGradStore.pop found no group of functions; call flush once before each pop"
            )
        _call_all(groups.popleft())

    @classmethod
    def clear(cls) -> None:
        """Forget all functions and groups."""
        store = _thread_store()
        store.cache = []
        store.groups.clear()


def _call_all(functions: list[Function]) -> None:
    with torch.no_grad():
        for function in functions:
            function()
