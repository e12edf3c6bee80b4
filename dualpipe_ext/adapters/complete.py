"""Checks that nothing of a model is lost or duplicated when it is cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import nn

from dualpipe_ext.adapters.plan import Stage

__all__ = ["check_complete", "find_ties"]

Ties = tuple[tuple[tuple[int, str], ...], ...]

# A remedy if the two stages of one rank share a parameter.
_SECOND_NAME = (
    ", or give the model a second name for it, as a head that is nn.Linear(..., bias=False) with "
    "head.weight = embedding.weight: a rank's two stages can share what has a name on each"
)


def check_complete(model: nn.Module, stages: Sequence[Stage]) -> None:
    """Raises if stages do not hold each parameter and buffer of the model exactly once.

    Names count: a parameter with two names (tied embeddings) may be on two stages.
    """
    kind = type(model).__name__
    found: dict[str, list[int]] = defaultdict(list)
    for index, stage in enumerate(stages):
        for name in stage.module.state_dict():
            found[name].append(index)
    expected = set(model.state_dict())
    if missing := sorted(expected - set(found)):
        raise ValueError(
            f"no stage of the {kind} would hold {_some(missing)}: its forward does not use them, "
            f"or its adapter leaves them out; remove them from the model, or register an adapter "
            f"for {kind} with dualpipe_ext.adapters.register_adapter"
        )
    if unknown := sorted(set(found) - expected):
        raise ValueError(f"stages of the {kind} hold {_some(unknown)}, which the model has not")
    if doubled := sorted(name for name, holders in found.items() if len(holders) > 1):
        holders = found[doubled[0]]
        raise ValueError(
            f"{_some(doubled)} of the {kind} would be held by several stages, {holders}, whose "
            f"copies would train apart; choose sizes, as in balance=[...], that keep its users on "
            f"one stage{_SECOND_NAME if sum(holders) == len(stages) - 1 else ''}"
        )


def find_ties(stages: Sequence[Stage]) -> Ties:
    """Returns the parameters that several stages hold, as (stage, name) of each place.

    Raises ValueError if they are not the two stages of one rank.
    """
    places: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for index, stage in enumerate(stages):
        for name, parameter in stage.module.named_parameters(remove_duplicate=False):
            places[id(parameter)].append((index, name))
    ties = tuple(
        tuple(found) for found in places.values() if len({index for index, _ in found}) > 1
    )
    _check_ties(ties, len(stages))
    return ties


def _check_ties(ties: Ties, num_stages: int) -> None:
    for tie in ties:
        holders = sorted({index for index, _ in tie})
        if len(holders) > 2 or sum(holders) != num_stages - 1:
            raise ValueError(
                f"{_some([name for _, name in tie])} are one parameter, used on stages {holders}; "
                f"a parameter can be shared by the stages r and P-1-r of one rank alone, as the "
                f"first and the last; choose other sizes, as in balance=[...], or untie them"
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
