"""What the replicas of a pipeline tell one another: numbers, objects, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch.distributed as dist

from dualpipe_ext._C import PipelineError, process_group_all_gather
from dualpipe_ext.host_groups import TIMEOUT_S, host_group, reaching

__all__ = ["ReplicaRanks"]

T = TypeVar("T")


class ReplicaRanks:
    """The ranks at the same position of all pipelines, which hold the same parameters.

    Without a group, there is one pipeline and nothing to exchange.

    Args:
        group: these ranks; there must be the same number for every position.

    Attributes:
        group: these ranks.
        index: the number of this rank among them.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.index = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    def gather(self, value: float) -> list[float]:
        """Returns the number that each replica passes, by replica.

        Raises:
            PipelineError: another replica has failed, with its reason, or cannot be reached.
        """
        return self._exchange(value, "")

    def gather_objects(self, value: T) -> list[T]:
        """Returns the object that each replica passes, by replica; they travel by pickle."""
        if self.group is None:
            return [value]
        gathered: list[T] = [value] * self.size
        with reaching("another replica"):
            dist.all_gather_object(gathered, value, group=host_group(self.group))
        return gathered

    @contextmanager
    def telling_failures(self, failure: str = "has failed") -> Iterator[None]:
        """Makes the next exchange of the others raise if anything is raised within.

        Args:
            failure: what this replica could not do then, for the others to read.
        """
        try:
            yield
        except BaseException as error:
            with suppress(PipelineError):
                self._exchange(0.0, f"{failure}: {type(error).__name__}: {error}")
            raise

    def together(self, act: Callable[[], T], failure: str = "has failed") -> T:
        """Calls ``act``; returns its result once all replicas have completed theirs.

        Raises:
            Exception: what ``act`` raised here, once the other replicas know of it.
            PipelineError: another replica has failed, with its reason, or cannot be reached.
        """
        with self.telling_failures(failure):
            made = act()
        self.gather(0.0)
        return made

    def from_first(self, make: Callable[[], T], failure: str) -> T:
        """Calls ``make`` on the first replica and returns its result on all.

        Raises as :meth:`together` does.
        """
        made = self.together(lambda: make() if self.index == 0 else None, failure)
        return self.gather_objects(made)[0]  # type: ignore[return-value]

    def _exchange(self, value: float, failure: str) -> list[float]:
        """Exchanges numbers, and texts only if there is a failure."""
        if self.group is None:
            return [value]
        with reaching("another replica"):
            told = process_group_all_gather(
                host_group(self.group), [float(bool(failure)), value], TIMEOUT_S
            )
        if any(has_failed for has_failed, _ in told):
            for replica, text in enumerate(self.gather_objects(failure)):
                if text:
                    raise PipelineError(f"replica {replica} {text}")
        return [number for _, number in told]
