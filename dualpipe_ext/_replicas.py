"""What replicas of a pipeline tell one another where it may take long: any object, by pickle."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from dualpipe_ext._C import PipelineError
from dualpipe_ext.host_groups import host_group, reaching

__all__ = [
    "gather_from_replicas",
    "on_all_replicas",
    "on_first_replica",
    "replica_of",
]

T = TypeVar("T")


def replica_of(replicas: dist.ProcessGroup | None) -> int:
    """Returns the number of the replica that this rank belongs to."""
    return 0 if replicas is None else dist.get_rank(replicas)


def gather_from_replicas(replicas: dist.ProcessGroup | None, value: T) -> list[T]:
    """Returns the value of each replica, by replica."""
    if replicas is None:
        return [value]
    gathered: list[T] = [value] * replicas.size()
    with reaching("another replica"):
        dist.all_gather_object(gathered, value, group=host_group(replicas))
    return gathered


def on_all_replicas(replicas: dist.ProcessGroup | None, make: Callable[[], T], failure: str) -> T:
    """Calls ``make`` on every replica and returns this one's result, once all have theirs.

    Raises:
        Exception: what ``make`` raised here, once the other replicas know of it.
        PipelineError: ``make`` raised on another replica (``failure`` says what that one could not
            do), or another one cannot be reached.
    """
    try:
        made = make()
    except Exception as error:  # whatever it is, the other replicas must not wait for this one
        gather_from_replicas(replicas, f"{type(error).__name__}: {error}")
        raise
    for replica, text in enumerate(gather_from_replicas(replicas, "")):
        if text:
            raise PipelineError(f"replica {replica} {failure}: {text}")
    return made


def on_first_replica(replicas: dist.ProcessGroup | None, make: Callable[[], T], failure: str) -> T:
    """Calls ``make`` on the first replica and returns its result on all.

    Raises as :func:`on_all_replicas` does.
    """
    is_first = replica_of(replicas) == 0
    made = on_all_replicas(replicas, lambda: make() if is_first else None, failure)
    return gather_from_replicas(replicas, made)[0]  # type: ignore[return-value]
