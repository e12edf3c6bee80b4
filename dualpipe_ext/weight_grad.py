"""Deferred weight gradients: layers that defer natively, and a store for custom functions."""

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
    """Makes the linear layers of a module leave their weight gradients to the engine.

    Every ``nn.Linear`` and every transformers ``Conv1D`` in ``module`` gets a ``forward`` of its
    own, which computes the same bits. In a step of the engine, the backward pass for inputs (I)
    then skips the gradients of weight and bias, and the pass for weights (W) adds them in place to
    ``.grad``, or to ``main_grad`` if the parameter has one. Outside a step nothing changes.
    Parameters, their names and hooks, and the hooks of modules stay as they are; a deep copy also
    defers, an unpickled module does not. Calling this twice is harmless.

    Args:
        module: any module; changed in place.

    Returns:
        Which weights are deferred, which may be, which are not, and why.
    """
    for layer in module.modules():
        if can_defer_natively(layer):
            layer.__dict__["forward"] = DeferredForward(layer)
    return weight_split(module)


def undo_defer_weight_gradients(module: nn.Module) -> None:
    """Restores the ``forward`` of every layer that :func:`defer_weight_gradients` changed."""
    for layer in module.modules():
        if isinstance(layer.__dict__.get("forward"), DeferredForward):
            del layer.__dict__["forward"]


Function = Callable[[], object]

_TLS_KEY = "dualpipe_ext.WeightGradStore"


@dataclass
class _ThreadStore:
    """The store of a thread, for use outside an engine."""

    enabled: bool = False
    cache: list[Function] = field(default_factory=list)
    groups: deque[list[Function]] = field(default_factory=deque)


def _thread_store() -> _ThreadStore:
    # In torch's thread-local state, which autograd's threads inherit from their caller.
    if not torch._C._is_key_in_tls(_TLS_KEY):
        _stash(_ThreadStore())
    store = torch._C._get_obj_in_tls(_TLS_KEY)
    assert isinstance(store, _ThreadStore)
    return store


def _stash(store: _ThreadStore) -> None:
    num_references = sys.getrefcount(store)
    torch._C._stash_obj_in_tls(_TLS_KEY, store)
    if sys.getrefcount(store) == num_references:
        # When the thread ends, torch 2.11 releases a reference that it never took.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))


class _StoreType(type):
    """Makes ``enabled`` a property of the class."""

    @property
    def enabled(cls) -> bool:
        """Whether a backward function should ``put`` its weight gradient instead of computing it.

        True in the passes of an engine that defer (I). Outside an engine, it is what this thread
        last assigned, initially False.
        """
        queue = _C.current_weight_queue()
        return (queue is not None and queue.deferring) or _thread_store().enabled

    @enabled.setter
    def enabled(cls, value: bool) -> None:
        _thread_store().enabled = bool(value)


class WeightGradStore(metaclass=_StoreType):
    """Where custom backward functions leave their weight gradients for later.

    In the backward of an ``autograd.Function``, test ``WeightGradStore.enabled`` and pass ``put`` a
    function that adds the weight gradient. The engine calls it in the W of that stage and
    micro-batch, with gradients disabled; the step raises whatever it raises. On CUDA, a backward
    runs in autograd's threads, and the function in the engine's thread.

    The class holds no state. In a step, it stands for the queue of the engine; elsewhere for a
    store of the calling thread, which you flush and pop yourself::

        WeightGradStore.enabled = True
        loss.backward()  # functions are put
        WeightGradStore.enabled = False
        WeightGradStore.flush()  # one group
        WeightGradStore.pop()  # runs the oldest group
    """

    @classmethod
    def put(cls, function: Function) -> None:
        """Keeps a function for later; calls it now if the engine's pass does not defer.

        Raises:
            TypeError: ``function`` is not callable.
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
        """Makes one group, possibly empty, of the functions put since the last flush."""
        store = _thread_store()
        store.groups.append(store.cache)
        store.cache = []

    @classmethod
    def pop(cls) -> None:
        """Calls the functions of the oldest group, in order, and discards them.

        Raises:
            ValueError: there is no group.
        """
        groups = _thread_store().groups
        if not groups:
            raise ValueError(
                "WeightGradStore.pop found no group of functions; call flush once before each pop"
            )
        _call_all(groups.popleft())

    @classmethod
    def clear(cls) -> None:
        """Discards all functions and groups."""
        store = _thread_store()
        store.cache = []
        store.groups.clear()


def _call_all(functions: list[Function]) -> None:
    with torch.no_grad():
        for function in functions:
            function()
