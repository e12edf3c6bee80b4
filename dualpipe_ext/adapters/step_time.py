"""How long a DualPipe step takes whose stages take different times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from dualpipe_ext.adapters.cost import Cost
from dualpipe_ext.schedule import plan

__all__ = ["step_seconds"]

_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
Action = tuple[int, str, int]  # (stage, kind, micro-batch)


def step_seconds(stages: Sequence[Cost], num_microbatches: int) -> float:
    """The makespan of a step of DualPipe with messages that take no time.

    Runs the actions that the engine runs: each rank in its order, each action as soon as its input
    is there. (:meth:`dualpipe_ext.schedule.Schedule.simulate` takes one cost for all stages.)
    """
    rows = _rows(len(stages), num_microbatches)
    clocks = [0.0] * len(rows)
    places = [0] * len(rows)
    ends: dict[Action, float] = {}
    ready = list(range(len(rows)))
    while ready:
        rank = ready.pop()
        for action in rows[rank][places[rank] :]:
            needed = _needed(action, len(stages))
            if needed is not None and needed not in ends:
                break
            stage, kind, microbatch = action
            start = max(clocks[rank], ends[needed] if needed else 0.0)
            clocks[rank] = start + _seconds(stages[stage], kind)
            ends[(stage, "I" if kind == "B" else kind, microbatch)] = clocks[rank]
            places[rank] += 1
            ready += [r for r in (rank - 1, rank + 1) if 0 <= r < len(rows) and r not in ready]
    return max(clocks)


def _needed(action: Action, num_stages: int) -> Action | None:
    """The action of another stage whose result this one waits for."""
    stage, kind, microbatch = action
    if kind == "F":
        return (stage - 1, "F", microbatch) if stage > 0 else None
    if kind == "W":
        return None
    return (stage + 1, "I", microbatch) if stage + 1 < num_stages else None


def _seconds(cost: Cost, kind: str) -> float:
    times = {"F": cost.forward, "I": cost.backward_input, "W": cost.backward_weight}
    return times["I"] + times["W"] if kind == "B" else times[kind]


@cache
def _rows(num_ranks: int, num_microbatches: int) -> list[list[Action]]:
    lowered = plan("dualpipe", num_ranks, num_microbatches).lower()
    return [
        [
            (int(found[1]), found[2], int(found[3]))
            for action in lowered.actions(rank)
            if (found := _ACTION.fullmatch(action))
        ]
        for rank in range(num_ranks)
    ]
