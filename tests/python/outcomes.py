"""What every rank of a group came to, raised errors included; the same for threads and processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dualpipe_ext.testing import run_ranks


@dataclass
class Outcome:
    """A rank's result, or its error by name, text and cause."""

    value: Any = None
    error: str = ""
    bases: tuple[str, ...] = ()
    text: str = ""
    cause: str = ""
    cause_text: str = ""
    seconds: float = 0.0

    def is_a(self, *names: str) -> bool:
        return any(name in self.bases for name in names)


def attempt(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Calls the function and describes how it went."""
    start = time.monotonic()
    try:
        return Outcome(fn(*args, **kwargs), seconds=time.monotonic() - start)
    except Exception as error:  # noqa: BLE001 - the caller looks at it
        return _describe(error, time.monotonic() - start)


def _describe(error: Exception, seconds: float) -> Outcome:
    cause = error.__cause__
    return Outcome(
        error=type(error).__name__,
        bases=tuple(base.__name__ for base in type(error).__mro__),
        text=str(error),
        cause=type(cause).__name__ if cause is not None else "",
        cause_text=str(cause) if cause is not None else "",
        seconds=seconds,
    )


def _attempt_on_rank(rank: int, num_ranks: int, fn: Callable[..., Any], *args: Any) -> Outcome:
    return attempt(fn, rank, num_ranks, *args)


def outcomes(
    fn: Callable[..., Any], num_ranks: int, ranks: str = "threads", args: tuple[Any, ...] = ()
) -> list[Outcome]:
    """``fn(rank, num_ranks, *args)`` on every rank, with a minute for everything."""
    found: list[Outcome] = run_ranks(
        _attempt_on_rank,
        num_ranks,
        ranks,  # type: ignore[arg-type]
        (fn, *args),
        timeout=60.0,
    )
    return found
