"""Which weights of a module have gradients that can be deferred."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from dualpipe_ext._deferred_forward import DeferredForward
from dualpipe_ext._sharded import is_sharded

TRANSFORMERS_MODULES = ("transformers.pytorch_utils", "transformers.modeling_utils")


class WeightSplit(enum.Enum):
    """Where the weight gradients of a module are computed."""

    NATIVE = "deferred natively"
    STORE = "up to its code (WeightGradStore)"
    NONE = "computed in I"


@dataclass(frozen=True)
class ModuleSplit:
    """One module with parameters of its own.

    Attributes:
        name: its name in the whole module; empty for the whole module itself.
        type_name: the name of its class.
        split: where its weight gradients are computed.
        num_weights: the number of elements of its parameters that require gradients. A parameter
            that several modules share counts once, for the one that defers it.
        reason: why it is not deferred natively; empty if it is.
    """

    name: str
    type_name: str
    split: WeightSplit
    num_weights: int
    reason: str


@dataclass(frozen=True)
class WeightSplitReport:
    """Which weights of a module are deferred, and why others are not.

    Parameters that are used outside the forward of their own module, as in
    ``F.linear(x, self.layer.weight)``, cannot be detected: their gradients are computed in I.

    Attributes:
        modules: the modules with parameters of their own, in the order of ``named_modules``.
    """

    modules: tuple[ModuleSplit, ...]

    def num_weights(self, split: WeightSplit | None = None) -> int:
        """Returns the number of weights that require gradients: of one kind, or of all."""
        return sum(m.num_weights for m in self.modules if split in (None, m.split))

    def share(self, split: WeightSplit) -> float:
        """Returns the share of weights that are of one kind, from 0 to 1; 0 if there are none."""
        return self.num_weights(split) / max(self.num_weights(), 1)

    def to_dict(self) -> dict[str, object]:
        """Returns the report as plain data, for JSON."""
        return {
            "shares": {split.name.lower(): self.share(split) for split in WeightSplit},
            "num_weights": self.num_weights(),
            "modules": [{**asdict(m), "split": m.split.name.lower()} for m in self.modules],
        }

    def __str__(self) -> str:
        """Returns a table: the share of each kind, then the modules not deferred natively."""
        shares = [
            f"{self.share(split):7.1%}  {self.num_weights(split):>15,}  {split.value}"
            for split in WeightSplit
        ]
        rows = [
            (m.name or "(itself)", m.type_name, f"{m.num_weights:,}", m.reason)
            for m in self.modules
            if m.split is not WeightSplit.NATIVE
        ]
        return "\n".join([f"{'share':>7}  {'weights':>15}  gradients", *shares, *_table(rows)])


def weight_split(module: nn.Module) -> WeightSplitReport:
    """Reports which weights of a module can be deferred, without changing it."""
    functional = {id(layer) for layer in _used_as_functions(module)}
    compiled = {id(layer) for layer in _compiled(module)}
    found: list[tuple[str, nn.Module, WeightSplit, str]] = []
    for name, layer in module.named_modules():
        if any(True for _ in layer.parameters(recurse=False)):
            split, reason = _classify(layer, id(layer) not in functional, id(layer) in compiled)
            found.append((name, layer, split, reason))
    counts = _count_weights([(layer, split) for _, layer, split, _ in found])
    return WeightSplitReport(
        tuple(
            ModuleSplit(name, type(layer).__name__, split, counts[id(layer)], reason)
            for name, layer, split, reason in found
        )
    )


def can_defer_natively(layer: nn.Module) -> bool:
    """Whether the layer is linear and a :class:`DeferredForward` can replace its forward."""
    kind = _linear_class(layer)
    return kind is not None and not _own_forward(layer, kind) and not _unusable_weight(layer)


def _linear_class(layer: nn.Module) -> type[nn.Module] | None:
    for kind in type(layer).__mro__:
        is_conv1d = kind.__name__ == "Conv1D" and kind.__module__ in TRANSFORMERS_MODULES
        if kind is nn.Linear or is_conv1d:
            return kind
    return None


def _own_forward(layer: nn.Module, kind: type[nn.Module]) -> str:
    if type(layer).forward is not kind.forward:
        return f"{type(layer).__name__} has a forward of its own"
    own = layer.__dict__.get("forward")
    if own is None or isinstance(own, DeferredForward):
        return ""
    return "" if getattr(own, "__func__", None) is kind.forward else "its forward was replaced"


def _unusable_weight(layer: nn.Module) -> str:
    weight = layer._parameters.get("weight")
    if is_parametrized(layer) or weight is None:
        return "its weight is computed from other parameters"
    if is_lazy(weight):
        return "it has no weight yet; run it once first"
    if type(weight) not in (nn.Parameter, Tensor) and not is_sharded(weight):
        return f"its weight is a {type(weight).__name__}"
    if weight.is_complex():
        return "its weight is complex"
    return ""


def _classify(layer: nn.Module, called: bool, compiled: bool) -> tuple[WeightSplit, str]:
    type_name = type(layer).__name__
    if not any(p.requires_grad for p in layer.parameters(recurse=False)):
        return WeightSplit.NONE, "frozen"
    if not called:
        return WeightSplit.NONE, "its parent computes with its weight itself"
    kind = _linear_class(layer)
    if kind is None and type(layer).__module__.partition(".")[0] == "torch":
        return WeightSplit.NONE, f"there is no deferred {type_name}"
    if kind is None:
        return WeightSplit.STORE, f"{type_name} is not one of torch's layers"
    if reason := _own_forward(layer, kind):
        return WeightSplit.STORE, reason
    if reason := _unusable_weight(layer):
        return WeightSplit.NONE, reason
    if compiled:
        return WeightSplit.NONE, "torch.compile computes it, and its gradients at once"
    return WeightSplit.NATIVE, ""


def _used_as_functions(module: nn.Module) -> Iterator[nn.Module]:
    for layer in module.modules():
        if isinstance(layer, nn.MultiheadAttention):
            yield layer.out_proj


def _compiled(module: nn.Module) -> Iterator[nn.Module]:
    for layer in module.modules():
        kind = type(layer)
        wrapper = kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo")
        if wrapper or getattr(layer, "_compiled_call_impl", None) is not None:
            yield from layer.modules()


def _count_weights(layers: list[tuple[nn.Module, WeightSplit]]) -> dict[int, int]:
    counts = {id(layer): 0 for layer, _ in layers}
    counted: set[int] = set()
    for layer, _ in sorted(layers, key=lambda item: list(WeightSplit).index(item[1])):
        for parameter in layer.parameters(recurse=False):
            if parameter.requires_grad and not is_lazy(parameter) and id(parameter) not in counted:
                counted.add(id(parameter))
                counts[id(layer)] += parameter.numel()
    return counts


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    if not rows:
        return []
    rows = [("module", "type", "weights", "not deferred natively because"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "",
        *(
            f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}  {reason}"
            for name, kind, count, reason in rows
        ),
    ]
