"""Waits for ranks, and finds what to raise if that fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from dualpipe_ext._C import PipelineError

__all__ = ["first_cause", "time_of_end", "too_late", "wait"]


def time_of_end(timeout: float | None) -> float:
    """Returns the end of ``timeout`` on the monotonic clock, which all processes share."""
    return math.inf if timeout is None else time.monotonic() + timeout


def wait(running: Callable[[], bool], failed: Callable[[], bool], timeout: float | None) -> None:
    """Waits for all ranks; once one has failed, the others have 15 seconds to notice."""
    deadline = time_of_end(timeout)
    patience = 15.0
    pause = 0.0002
    while running():
        if patience and failed():
            deadline = min(deadline, time.monotonic() + patience)
            patience = 0.0
        if time.monotonic() > deadline:
            return
        time.sleep(pause)
        pause = min(2 * pause, 0.01)


def too_late(late: Sequence[int], num_ranks: int, timeout: float | None) -> TimeoutError:
    """Returns the error for ranks that did not finish, whose stacks have been printed."""
    which = f"ranks {', '.join(map(str, late))} were" if len(late) > 1 else f"rank {late[0]} was"
    return TimeoutError(
        f"{which} not through within timeout={timeout:g} s, of {num_ranks} ranks; their stacks are "
        f"on stderr: if they were at work, give run_ranks() a longer timeout=, or none for no limit"
    )


def first_cause(errors: dict[int, BaseException]) -> BaseException:
    """Returns the error that came first, not one that only repeats another rank's."""
    by_rank = [errors[rank] for rank in sorted(errors)]
    causes = [e for e in by_rank if not isinstance(e, (PipelineError, TimeoutError))]
    origins = [e for e in by_rank if e.__cause__ is not None or getattr(e, "is_origin", False)]
    return (causes or origins or by_rank)[0]
