"""Converts the state of optimizers between that of an unsplit run and the parts of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dualpipe_ext.compat.whole import on_host, own_copy
from dualpipe_ext.host_groups import reaching
from dualpipe_ext.pipeline import Pipeline

__all__ = ["load_whole_state", "save_whole_state"]


def save_whole_state(
    optimizer: Optimizer, model: nn.Module, pipeline: Pipeline, group: dist.ProcessGroup
) -> dict[str, Any]:
    """Returns what ``state_dict()`` of an optimizer of the whole model would return.

    In each group, parameters are in the model's order, and ``param_names`` has their names.

    Args:
        optimizer: the optimizer of this rank's stages.
        model: the whole model, which shares its parameters with the stages.
        pipeline: the pipeline of the stages.
        group: all ranks of the pipeline, each of which calls this.

    Returns:
        The whole state on the first rank; on others, only this rank's part of the states.
    """
    names = _names(model)
    kept = {id(p) for p in own_copy(pipeline).parameters()}
    own = optimizer.state_dict()
    part = {
        names[id(p)]: on_host(own["state"][index])
        for index, p in _indexed(optimizer).items()
        if id(p) in kept and index in own["state"]
    }
    parts: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    with reaching("another rank"):
        dist.gather_object(part, parts, group=group, group_dst=0)
    states = {name: state for found in parts or [part] for name, state in found.items()}
    members = _members(optimizer, model, group)
    order = _order(members)
    groups = [
        {**options, "params": [order[name] for name in listed], "param_names": listed}
        for options, listed in zip(own["param_groups"], members, strict=True)
    ]
    return {
        "state": {order[name]: states[name] for name in sorted(states, key=order.__getitem__)},
        "param_groups": groups,
    }


def load_whole_state(
    optimizer: Optimizer, model: nn.Module, found: Mapping[str, Any], group: dist.ProcessGroup
) -> None:
    """Loads an optimizer's part of a whole state, of a pipeline or of an unsplit run.

    If the state has no names, its parameters are assumed to be in the model's order.

    Args:
        optimizer: the optimizer of this rank's stages.
        model: the whole model.
        found: the whole state, such as :func:`save_whole_state` returned it on the first rank.
        group: all ranks of the pipeline, each of which calls this.

    Raises:
        ValueError: the groups of parameters differ in their sizes.
    """
    members = _members(optimizer, model, group)
    saved = found["param_groups"]
    if [len(options["params"]) for options in saved] != [len(listed) for listed in members]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of "
            f"{[len(options['params']) for options in saved]} parameters, this one of "
            f"{[len(listed) for listed in members]}; make the same ones in configure_optimizers"
        )
    by_name = {
        name: found["state"][index]
        for options, listed in zip(saved, members, strict=True)
        for name, index in zip(options.get("param_names", listed), options["params"], strict=True)
        if index in found["state"]
    }
    names = _names(model)
    mine = {index: names[id(p)] for index, p in _indexed(optimizer).items()}
    groups = [
        {**{k: v for k, v in options.items() if k != "param_names"}, "params": own["params"]}
        for options, own in zip(saved, optimizer.state_dict()["param_groups"], strict=True)
    ]
    state = {index: by_name[name] for index, name in mine.items() if name in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _members(optimizer: Optimizer, model: nn.Module, group: dist.ProcessGroup) -> list[list[str]]:
    """Returns the names in each group of parameters, over all ranks and in the model's order."""
    names = _names(model)
    own = [[names[id(p)] for p in options["params"]] for options in optimizer.param_groups]
    ranks: list[Any] = [None] * group.size()
    with reaching("another rank"):
        dist.all_gather_object(ranks, own, group=group)
    order = {name: i for i, name in enumerate(names.values())}
    return [
        sorted(set().union(*listed), key=order.__getitem__) for listed in zip(*ranks, strict=True)
    ]


def _order(members: list[list[str]]) -> dict[str, int]:
    return {name: i for i, name in enumerate(name for listed in members for name in listed)}


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _indexed(optimizer: Optimizer) -> dict[int, nn.Parameter]:
    """Returns parameters by their number in ``state_dict()``."""
    return dict(enumerate(p for options in optimizer.param_groups for p in options["params"]))
