"""What the ranks of a pipeline tell one another outside of its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dualpipe_ext._advice import warn_caller
from dualpipe_ext._C import PipelineError
from dualpipe_ext.groups import PipelineGroup

__all__ = ["act_together", "agree", "check_others", "collect", "gather_numbers"]

_NOT_COMPARED = ("stages", "schedule name", "offer", "are sharded", "has shards", "warnings")

Describe = Callable[[], Any]  # returns what JSON can hold


def agree(group: PipelineGroup, timeout: float, describe: Describe) -> list[Any]:
    """Calls ``describe`` on every rank, compares the results and returns them, by rank.

    Entries must be equal on all ranks; those under ``"stages"``, on ranks that hold the same stage.
    ``"schedule name"``, ``"offer"`` and what is sharded are not compared. Neither are
    ``"warnings"``, texts by topic: the first rank warns on behalf of all, once for each topic.

    Raises:
        Exception: what ``describe`` raised on this rank, once the others know of it.
        ValueError: the ranks differ; raised on every rank, saying what was found where.
        PipelineError: ``describe`` raised on another rank, or a rank did not join.
    """
    facts = collect(group, timeout, describe, "could not make its pipeline")
    _compare(facts)
    if group.rank == 0:
        warnings: dict[str, str] = {}
        for told in reversed(facts):  # the text of the first rank that has one
            warnings |= told.get("warnings", {})
        for text in warnings.values():
            warn_caller(text)
    return facts


def collect(group: PipelineGroup, timeout: float, describe: Describe, failure: str) -> list[Any]:
    """Calls ``describe`` on every rank and returns the results, by rank. They travel as JSON.

    Raises:
        Exception: what ``describe`` raised on this rank, once the others know of it.
        PipelineError: ``describe`` raised on another rank (``failure`` says what that one could not
            do), or a rank did not join.
    """
    try:
        own = json.dumps({"facts": describe()})
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        group.all_gather(json.dumps({"error": f"{type(error).__name__}: {error}"}), timeout)
        raise
    answers = [json.loads(text) for text in group.all_gather(own, timeout)]
    for rank, answer in enumerate(answers):
        if "error" in answer:
            raise PipelineError(f"rank {rank} {failure}: {answer['error']}")
    return [answer["facts"] for answer in answers]


def act_together(
    group: PipelineGroup, timeout: float, act: Callable[[], None], *, failure: str
) -> None:
    """Calls ``act`` on every rank, in steps in which exchanging texts would take too long.

    If ``act`` itself exchanges something, it must call :func:`check_others` before that.

    Raises as :func:`collect` does.
    """

    def act_and_count() -> float:
        act()
        return 0.0

    gather_numbers(group, timeout, act_and_count, failure)


def gather_numbers(
    group: PipelineGroup, timeout: float, compute: Callable[[], float], failure: str
) -> list[float]:
    """Calls ``compute`` on every rank and returns the results, by rank; with a single exchange.

    Raises as :func:`collect` does.
    """
    raised: Exception | None = None
    value = 0.0
    try:
        value = compute()
    except _ToldError as error:
        raise PipelineError(str(error)) from None
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait
        raised = error
    try:
        told = group.all_gather_floats([float(raised is not None), value], timeout)
        if any(has_failed for has_failed, _ in told):
            collect(group, timeout, lambda: _raise(raised), failure)
        return [number for _, number in told]
    finally:
        raised = None  # its frames refer to this one, and would keep objects of callers alive


def check_others(group: PipelineGroup, timeout: float, failure: str) -> None:
    """Raises if another rank has already failed; called within :func:`act_together`.

    Raises:
        PipelineError: another rank has failed, with its reason.
    """
    if any(flag for flag, _ in group.all_gather_floats([0.0, 0.0], timeout)):
        try:
            collect(group, timeout, lambda: None, failure)
        except PipelineError as error:
            raise _ToldError(str(error)) from None


class _ToldError(PipelineError):
    """An error of another rank that all ranks already know of."""


def _raise(error: Exception | None) -> None:
    try:
        if error is not None:
            raise error
    finally:
        del error  # as in act_together()


def _compare(facts: list[dict[str, Any]]) -> None:
    for key, expected in facts[0].items():
        for rank, other in enumerate(facts):
            if key not in _NOT_COMPARED and other[key] != expected:
                raise ValueError(
                    f"ranks differ in {key}: {_value(facts[0], key)} on rank 0, "
                    f"{_value(other, key)} on rank {rank}; construct the pipeline alike on all ranks"
                )
    seen: dict[str, tuple[int, Any]] = {}
    for rank, other in enumerate(facts):
        for stage, description in other["stages"].items():
            first_rank, expected = seen.setdefault(stage, (rank, description))
            if description != expected:
                raise ValueError(
                    f"stage {stage} differs between its copies on ranks {first_rank} and {rank}: "
                    f"{_first_difference(expected, description)}; both ranks need the same module "
                    f"for it, and the same optimizer"
                )


def _value(facts: dict[str, Any], key: str) -> str:
    if key == "schedule" and "schedule name" in facts:  # to read: schedules may differ in name only
        return f"{facts['schedule name']!r} ({facts[key]})"
    return str(facts[key]) if key.startswith("DualPipeConfig.") else repr(facts[key])


def _first_difference(left: list[Any], right: list[Any]) -> str:
    for a, b in zip(left, right, strict=False):
        if a != b:
            return f"{_shown(a)} against {_shown(b)}"
    return f"{len(left)} parameters against {len(right)}"


def _shown(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    name, shape, dtype = entry
    return f"{name} of shape {tuple(shape)}, {dtype}"
