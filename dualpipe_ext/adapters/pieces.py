"""Cuts a traced model into pieces: one module for each stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import attrgetter

from torch import Tensor, fx, nn

from dualpipe_ext.adapters.first_call import FirstCall
from dualpipe_ext.adapters.parts import single_layers
from dualpipe_ext.adapters.plan import Outputs, Stage
from dualpipe_ext.adapters.torch_stacks import is_causal_mask
from dualpipe_ext.adapters.trace import trace_layers

__all__ = ["TracedModel"]

Nodes = list[fx.Node]


class TracedModel:
    """The graph of a model, which can be cut after any of its layers.

    Each node belongs to the last layer that ran before it. What a stage needs from earlier ones
    travels to it through all stages in between: masks, position tables, hidden states.

    Args:
        model: the model whose forward is traced.
        layers: names of submodules, in the order in which they run.
        inputs: arguments of the forward that are tensors.

    Raises:
        ValueError: the forward cannot be traced, or runs the layers in another order.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], inputs: Sequence[str]) -> None:
        self._model = model
        self._layers = list(layers)
        trace = trace_layers(model, layers, inputs)
        self._graph, self._constants = trace.graph, trace.constants
        self._layer_of = self._assign()

    def cut(self, stages: Sequence[range]) -> list[Stage]:
        """Makes one module for each stage; ``stages[s]`` are the indices of its layers.

        Raises:
            ValueError: a skip connection crosses from one stage to another.
        """
        stage_of = {node: self._stage(node, stages) for node in self._layer_of}
        self._check_skips(stage_of)
        arriving = [self._arriving(stage_of, s) for s in range(len(stages))] + [[]]
        modules = [
            self._module(
                [node for node, at in stage_of.items() if at == s], arriving[s], arriving[s + 1]
            )
            for s in range(len(stages))
        ]
        first, *others = modules
        first_call = FirstCall.of(self._model, self._graph)
        return [Stage(first, first_call), *(Stage(module, _call) for module in others)]

    def parts(self) -> list[range]:
        """Returns the parts that can be on different stages; layers that a skip bypasses are one.

        As :meth:`dualpipe_ext.adapters.ModelAdapterBase.parts` does.
        """
        singles = single_layers(len(self._layers))
        stage_of = {node: self._stage(node, singles) for node in self._layer_of}
        joined = {
            border  # between the parts border and border + 1
            for node, user in self._skips(stage_of)
            for border in range(self._next_cut(node, stage_of), stage_of[user])
        }
        parts = singles[:1]
        for border, layers in enumerate(singles[1:]):
            if border in joined:
                parts[-1] = range(parts[-1].start, layers.stop)
            else:
                parts.append(layers)
        return parts

    def _assign(self) -> dict[fx.Node, int]:
        """Finds the layer that each node runs in or after; -1 before the first one.

        Raises ValueError if the layers do not run once each, in order.
        """
        found: list[str] = []
        layer_of = {}
        for node in self._graph.nodes:
            if node.op == "call_module" and node.target in self._layers:
                found.append(str(node.target))
            layer_of[node] = len(found) - 1
        if found != self._layers:
            wrong = [a for a, b in zip(found, self._layers, strict=False) if a != b]
            raise ValueError(
                f"the forward of {type(self._model).__name__} runs {len(found)} of its "
                f"{len(self._layers)} layers{f', {wrong[0]} out of order' if wrong else ''}; each "
                f"has to run once, in the order of their list"
            )
        return layer_of

    def _stage(self, node: fx.Node, stages: Sequence[range]) -> int:
        if node.op == "output":
            return len(stages) - 1
        layer = self._layer_of[node]
        if layer < 0:
            return 0
        behind_all = layer == len(self._layers) - 1 and node.target != self._layers[-1]
        if behind_all:
            return len(stages) - 1
        return next(s for s, own in enumerate(stages) if layer in own)

    @cached_property
    def _sizes(self) -> set[fx.Node]:
        """Nodes that are numbers or describe tensors; each stage computes those that it needs."""
        found: set[fx.Node] = set()
        for node in self._graph.nodes:
            method = node.op == "call_method" and node.target in ("size", "dim", "numel")
            of_tensor = method or node.target is is_causal_mask
            attribute = node.target is getattr and node.args[1] in _DESCRIPTIONS
            arguments = node.all_input_nodes
            of_sizes = bool(arguments) and all(a in found for a in arguments)
            plain = getattr(node.target, "__module__", "") in ("_operator", "builtins")
            if of_tensor or attribute or (node.op == "call_function" and plain and of_sizes):
                found.add(node)
        return found

    @cached_property
    def _from_layers(self) -> set[fx.Node]:
        """Nodes that depend on what a layer computed."""
        found: set[fx.Node] = set()
        for node in self._graph.nodes:
            if node.target in self._layers or any(a in found for a in node.all_input_nodes):
                found.add(node)
        return found

    def _needs(self, node: fx.Node) -> set[fx.Node]:
        """Returns the tensors that a node is computed from."""
        needed: set[fx.Node] = set()
        for argument in node.all_input_nodes:
            needed |= self._needs(argument) if argument in self._sizes else {argument}
        return needed

    def _arriving(self, stage_of: dict[fx.Node, int], stage: int) -> Nodes:
        """Returns the nodes that earlier stages send to a stage; for the first one, the inputs."""
        if stage == 0:
            return [node for node in stage_of if node.op == "placeholder"]
        needed = {
            needed
            for node, at in stage_of.items()
            if at >= stage and node not in self._sizes
            for needed in self._needs(node)
            if stage_of[needed] < stage and needed.op != "get_attr"
        }
        return [node for node in stage_of if node in needed]

    def _check_skips(self, stage_of: dict[fx.Node, int]) -> None:
        for node, user in self._skips(stage_of):
            raise ValueError(self._skip(node, user, stage_of))

    def _skips(self, stage_of: dict[fx.Node, int]) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Yields nodes whose result bypasses a whole stage, with their users."""
        for user, at in stage_of.items():
            for node in self._needs(user) & self._from_layers if user not in self._sizes else ():
                if at > self._next_cut(node, stage_of):
                    yield node, user

    def _next_cut(self, node: fx.Node, stage_of: dict[fx.Node, int]) -> int:
        """Returns the last stage that may use what a node computes."""
        layer = self._layer_of[node]
        if layer + 1 == len(self._layers):
            return max(stage_of.values())
        return stage_of[self._calls[layer + 1]]

    @cached_property
    def _calls(self) -> Nodes:
        return [node for node in self._graph.nodes if node.target in self._layers]

    def _skip(self, node: fx.Node, user: fx.Node, stage_of: dict[fx.Node, int]) -> str:
        source = self._layers[self._layer_of[node]]
        is_behind = user.op == "output" or user.target not in self._layers
        target = f"{'behind' if is_behind else 'in'} {self._layers[self._layer_of[user]]}"
        return (
            f"{type(self._model).__name__} has a skip connection across stages: what {source} "
            f"computes (stage {stage_of[node]}) is used {target} (stage {stage_of[user]}), past "
            f"the layers in between; choose sizes, as in balance=[...], that keep both on one "
            f"stage, or let those layers take and return it as well"
        )

    def _module(self, nodes: Nodes, arriving: Nodes, leaving: Nodes) -> fx.GraphModule:
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in arriving}

        def copy_of(node: fx.Node) -> fx.Node:
            if node not in copies:  # sizes and constants of the model: copied where needed
                copies[node] = graph.node_copy(node, copy_of)
            return copies[node]

        for node in nodes:
            if node.op not in ("placeholder", "get_attr", "output") and node not in self._sizes:
                copy_of(node)
        if nodes and nodes[-1].op == "output":
            graph.node_copy(nodes[-1], copy_of)
        else:
            graph.output(tuple(copy_of(node) for node in leaving))
        return self._with_state(graph)

    def _with_state(self, graph: fx.Graph) -> fx.GraphModule:
        """Makes a module with the state that the graph uses; it saves what the model would save."""
        used = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
        state = {name: self._constants.get(name) for name in used}
        state |= {n: attrgetter(n)(self._model) for n in used - self._constants.keys()}
        module = fx.GraphModule(state, graph, type(self._model).__name__)
        module.training = self._model.training
        saved = self._model.state_dict()
        for name in (name for name, _ in module.named_buffers() if name not in saved):
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._non_persistent_buffers_set.add(leaf)
        return module


_DESCRIPTIONS = ("shape", "device", "dtype", "ndim")


def _call(module: nn.Module, *tensors: Tensor | None) -> Outputs:
    returned: Outputs = module(*tensors)
    return returned
