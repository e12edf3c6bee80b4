"""Traces a model's forward into a graph in which its layers are nodes."""

from __future__ import annotations

import ast
import copy
import linecache
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from dualpipe_ext.adapters.own_calls import check_call
from dualpipe_ext.adapters.torch_stacks import traceable_stacks

__all__ = ["Trace", "trace_layers", "tracing_lock"]

# Their arguments may be plain numbers, from which fx cannot tell that they belong in the graph.
_MAKERS = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")

# If traced, they would draw only once, and every step would get the same numbers.
_RANDOM_MAKERS = ("normal", "rand", "randint", "randn", "randperm")

tracing_lock = threading.Lock()
"""Held while tracing, which changes how all modules of the process are called: none may run."""


@dataclass(frozen=True)
class Trace:
    """The graph of a forward, and the constant tensors that it makes, by name in the graph."""

    graph: fx.Graph
    constants: dict[str, Tensor]


def trace_layers(model: nn.Module, layers: Sequence[str], inputs: Sequence[str]) -> Trace:
    """Runs a model's forward with stand-ins for its tensors, and records what it does.

    Args:
        model: the model to trace. Submodules stay whole, except those that contain layers.
        layers: names of submodules.
        inputs: arguments of the forward that are tensors; the others keep their defaults.

    Raises:
        ValueError: the forward decides by the values of its tensors, does something else that
            cannot be traced, or differs between training and evaluation outside its layers; or the
            call of a module that is traced through is not the forward of its class.
    """
    for name in ("", *sorted(_containers(layers))):
        check_call(model.get_submodule(name), name)
    with tracing_lock, _traced_makers(), traceable_stacks():
        trace, other = (_trace(model, layers, inputs, mode) for mode in (False, True))
    if _steps(trace.graph) != _steps(other.graph):
        raise ValueError(
            f"the forward of {type(model).__name__} does something else in training than in "
            f"evaluation, outside of its layers, where no stage would notice the change; use "
            f"modules that do, such as nn.Dropout in place of functional.dropout"
        )
    return trace


def _trace(model: nn.Module, layers: Sequence[str], inputs: Sequence[str], training: bool) -> Trace:
    tracer = _LayerTracer(layers, inputs)
    modules = {name: model.get_submodule(name) for name in ("", *sorted(tracer.containers))}
    before = {name: _attributes(module) for name, module in modules.items()}
    contents = [
        (value, copy.copy(value))
        for attributes in before.values()
        for value in attributes.values()
        if type(value) in (dict, list)
    ]
    try:
        with _mode(model, tracer.containers, training):
            graph = tracer.trace(model)
        changed = [
            f"{name}.{key}".lstrip(".")
            for name, module in modules.items()
            for key, value in _attributes(module).items()
            if _is_of_the_trace(value)
        ]
        if changed:
            raise RuntimeError(
                f"it assigns {', '.join(changed)}, which stages would not do; keep what changes in "
                f"training inside of layers or submodules"
            )
        own = set(vars(model)) - before[""].keys()
        return Trace(graph, {name: vars(model)[name] for name in own})
    except Exception as error:  # whatever a forward may raise when it is called with stand-ins
        kind = type(model).__name__
        raise ValueError(
            f"the forward of {kind} cannot be traced, so it cannot be cut automatically: {error}; "
            f"keep what depends on the values of tensors inside of layers, or register an adapter "
            f"for {kind} with dualpipe_ext.adapters.register_adapter"
        ) from error
    finally:  # fx leaves constants on the model, and a forward whatever it assigns
        for name, module in modules.items():
            _restore(module, before[name])
        for container, content in contents:
            _refill(container, content)


_STORES = ("_parameters", "_buffers", "_modules")


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Returns all that a forward may assign to: attributes, parameters, buffers, submodules."""
    own = {name: value for name, value in vars(module).items() if name not in _STORES}
    return {**own, **module._parameters, **module._buffers, **module._modules}


def _is_of_the_trace(value: object) -> bool:
    """Whether a value holds a proxy, which has a meaning only while tracing."""
    if type(value) is dict:
        value = list(value.values())
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(each, fx.Proxy) for each in values)


def _refill(container: Any, content: Any) -> None:
    """Restores the earlier content of a list or dictionary."""
    container.clear()
    (container.update if isinstance(container, dict) else container.extend)(content)


def _restore(module: nn.Module, before: dict[str, Any]) -> None:
    """Restores a module's earlier attributes, parameters, buffers and submodules."""
    stores = [vars(module), *(vars(module)[name] for name in _STORES)]
    for store in stores:
        for name in [name for name in store if name not in before and name not in _STORES]:
            del store[name]
        for name in store.keys() & before.keys():
            store[name] = before[name]


def _steps(graph: fx.Graph) -> list[str]:
    return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]


@contextmanager
def _mode(model: nn.Module, containers: Iterable[str], training: bool) -> Iterator[None]:
    """Sets the mode of the modules that are traced through, and restores it afterwards."""
    modules = [model, *(model.get_submodule(name) for name in containers)]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def _containers(layers: Sequence[str]) -> set[str]:
    """Returns the names of modules that contain layers, except the model itself."""
    return {
        name.rsplit(".", depth)[0] for name in layers for depth in range(1, name.count(".") + 1)
    }


def _surroundings() -> tuple[Any, ...]:
    """Returns settings that a ``with`` in a forward may change without a trace in the graph."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )


class _LayerTracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that a buffer can be indexed by a size

    def __init__(self, layers: Sequence[str], inputs: Sequence[str]) -> None:
        super().__init__()
        self.containers = _containers(layers)
        self._inputs = list(inputs)
        self._surroundings = _surroundings()

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Makes a node; raises if the forward has changed settings that the graph does not show."""
        if _surroundings() != self._surroundings:
            raise RuntimeError(
                "it switches gradients or autocast outside of its layers, which no stage would do; "
                "move what is in that `with` into a submodule"
            )
        return super().create_proxy(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays whole: it does unless it contains layers."""
        return module_qualified_name not in self.containers

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Makes stand-ins for the inputs; other arguments keep their defaults."""

        def forward(*tensors: fx.Proxy) -> Any:
            return root_fn(self.root, **dict(zip(self._inputs, tensors, strict=True)))

        return forward, [self.create_proxy("placeholder", name, (), {}) for name in self._inputs]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Lets assertions and checks that may raise pass; other decisions cannot be traced."""
        passed = _outcome_of_check()
        return bool(super().to_bool(obj)) if passed is None else passed


def _outcome_of_check() -> bool | None:
    """Returns the outcome with which the traced check passes (``assert``, or ``if`` and raise)."""
    for frame in reversed(traceback.extract_stack(limit=10)):
        if frame.filename != __file__ and "/torch/fx/" not in frame.filename.replace("\\", "/"):
            line, following = (
                linecache.getline(frame.filename, number).strip()
                for number in ((frame.lineno or 0), (frame.lineno or 0) + 1)
            )
            return _passing(line, following)
    return None


def _passing(line: str, following: str) -> bool | None:
    """Returns what the terms of a check must be for it to pass; ``None``: it is no check.

    Each term of a compound condition is asked for by itself, and which one it is, is not known. One
    with negated terms is refused where this outcome does not let it pass.
    """
    if line.startswith(("assert ", "assert(")):
        return not _is_negated(line)
    if line.startswith(("if ", "if(", "elif ", "elif(")) and following.startswith("raise "):
        return _is_negated(f"{line.removeprefix('el')}\n pass")
    return None


def _is_negated(statement: str) -> bool:
    """Whether the whole condition is negated; not if its text goes on on the next line."""
    try:
        (check,) = ast.parse(statement).body
    except SyntaxError:
        return False
    condition = getattr(check, "test", None)
    return isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not)


@contextmanager
def _traced_makers() -> Iterator[None]:
    with ExitStack() as patches:
        for name in _MAKERS:
            patches.enter_context(mock.patch.object(torch, name, _traced(getattr(torch, name))))
        for name in _RANDOM_MAKERS:
            patches.enter_context(mock.patch.object(torch, name, _refused(getattr(torch, name))))
        yield


def _traced(maker: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(maker)
    def make(*args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, fx.Proxy):
                return argument.tracer.create_proxy("call_function", maker, args, kwargs)
        return maker(*args, **kwargs)

    return make


def _refused(maker: Callable[..., Any]) -> Callable[..., Any]:
    """Makes ``maker`` raise in the thread that traces; other threads may be other ranks."""
    thread = threading.get_ident()

    @wraps(maker)
    def make(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise RuntimeError(
                f"it calls torch.{maker.__name__} outside of its layers, whose numbers would be the "
                f"same in every step"
            )
        return maker(*args, **kwargs)

    return make
