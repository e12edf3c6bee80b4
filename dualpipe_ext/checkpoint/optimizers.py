"""State of optimizers by the names of parameters, whatever rank and group they are in.

Keys are those of torch's own ``get_optimizer_state_dict(..., flatten_optimizer_state_dict=True)``:
``state.<name>.<key>`` and ``param_groups.<name>.<option>``. That function needs one module that has
all parameters of the optimizer; a rank has two modules, which may share a parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dualpipe_ext.checkpoint.holdings import Holding

__all__ = [
    "OptimizerKeys",
    "gather_shards",
    "group_options",
    "kind_of",
    "optimizer_state",
    "restored_state",
]

_NOT_OPTIONS = ("params", "param_names")


def kind_of(optimizer: Optimizer) -> str:
    """Returns the name of the optimizer's class; that inside a ``ZeroRedundancyOptimizer``."""
    return type(getattr(optimizer, "optim", optimizer)).__name__


def gather_shards(optimizer: Optimizer) -> None:
    """Gathers the shards of a ``ZeroRedundancyOptimizer`` on the first replica; all call it.

    Its ``load_state_dict()`` takes the whole state on every rank, and keeps one shard.
    """
    gather = getattr(optimizer, "consolidate_state_dict", None)
    if gather is not None:
        gather(to=0)


def optimizer_state(optimizer: Optimizer, holding: Holding) -> dict[str, Any]:
    """Returns the optimizer's state and options for the parameters that this rank saves."""
    names = holding.saved_names()
    states = optimizer.state_dict()["state"]
    flat: dict[str, Any] = {}
    for group, members in _groups(optimizer):
        options = _options(group)
        for index, parameter in members:
            name = names.get(id(parameter))
            if name is not None:
                state = states.get(index) or {}
                flat |= {f"state.{name}.{key}": value for key, value in state.items()}
                flat |= {f"param_groups.{name}.{key}": value for key, value in options.items()}
    return flat


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the options of each group, for ranks that train none of its parameters."""
    return [_options(group) for group in optimizer.param_groups]


class OptimizerKeys:
    """Which keys belong to which parameter of a rank.

    Args:
        keys: all keys of the checkpoint.
        holding: the rank's holding. A parameter is found under each of its names.
    """

    def __init__(self, keys: Iterable[str], holding: Holding) -> None:
        owners = {name: key for key, names in holding.names().items() for name in names}
        self._found: dict[str, dict[int, dict[str, str]]] = {
            "state": defaultdict(dict),
            "param_groups": defaultdict(dict),
        }
        for key in keys:
            section, _, rest = key.partition(".")
            name = rest
            while name and name not in owners:
                name = name.rpartition(".")[0]
            if name:
                self._found[section][owners[name]][rest[len(name) + 1 :]] = key

    def all(self) -> list[str]:
        """Returns the keys of all parameters of the rank."""
        return [
            key
            for by_parameter in self._found.values()
            for keys in by_parameter.values()
            for key in keys.values()
        ]

    def state(self, parameter: Tensor) -> dict[str, str]:
        """Returns the keys of a parameter's optimizer state, by the names of its entries."""
        return self._found["state"].get(id(parameter), {})

    def options(self, parameter: Tensor) -> dict[str, str]:
        """Returns the keys of the options of a parameter's group, by the options' names."""
        return self._found["param_groups"].get(id(parameter), {})


def restored_state(
    optimizer: Optimizer,
    holding: Holding,
    keys: OptimizerKeys,
    values: Mapping[str, Any],
    by_group: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns the argument for ``optimizer.load_state_dict()``.

    Args:
        optimizer: the optimizer of this rank.
        holding: the rank's holding.
        keys: the keys of the rank's parameters.
        values: the values of these keys.
        by_group: the options of the groups in the run that saved.

    Raises:
        ValueError: a parameter was not trained in that run, or parameters of one group had
            different options.
    """
    names = holding.names()
    states: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for group, members in _groups(optimizer):
        shared: dict[str, Any] = {}
        for index, parameter in members:
            if id(parameter) not in names:  # a placeholder, on ranks that train nothing
                continue
            options = {option: values[key] for option, key in keys.options(parameter).items()}
            if not options and not parameter.requires_grad:
                continue
            _check_options(names[id(parameter)][0], options, shared)
            shared = options
            state = {name: values[key] for name, key in keys.state(parameter).items()}
            if state:
                states[index] = state
        if not shared and len(by_group) == len(optimizer.param_groups):
            shared = dict(by_group[len(groups)])
        groups.append({**group, **shared, "params": [index for index, _ in members]})
    return {"state": states, "param_groups": groups}


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _NOT_OPTIONS}


def _groups(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], list[tuple[int, Tensor]]]]:
    """Yields each group with its parameters and their numbers in a ``state_dict()``."""
    count = 0
    for group in optimizer.param_groups:
        members = list(enumerate(group["params"], count))
        count += len(members)
        yield group, members


def _check_options(name: str, options: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    if not options:
        raise ValueError(
            f"the optimizer trains {name}, which that of the checkpoint did not; freeze it, or "
            f"load the checkpoint without optimizer= and scheduler="
        )
    for option in sorted(options.keys() & others.keys()):
        if not _are_equal(options[option], others[option]):
            raise ValueError(
                f"{name} had {option}={options[option]!r} in the checkpoint, and others of its "
                f"group {others[option]!r}; make the same groups of parameters as the run that saved it"
            )


def _are_equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    return bool(left == right)
