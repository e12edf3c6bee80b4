"""What the ranks of a pipeline tell one another where it may take long: values, by pickle."""

from __future__ import annotations

import base64
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dualpipe_ext._handshake import collect
from dualpipe_ext.groups import LoopbackGroup, LoopbackHubs, PipelineGroup

__all__ = ["Ranks", "alone"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of one pipeline, threads or processes alike.

    Attributes:
        group: carries what the ranks tell one another.
        timeout: seconds to wait for the slowest rank.
    """

    group: PipelineGroup
    timeout: float

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self.group.rank

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that does what must be done just once."""
        return self.group.rank == 0

    def share(self, make: Callable[[], T], failure: str) -> list[T]:
        """Calls ``make`` on every rank and returns the results, by rank.

        Raises:
            Exception: what ``make`` raised on this rank, once the others know of it.
            PipelineError: ``make`` raised on another rank (``failure`` says what that one could not
                do), or a rank did not join.
        """
        told = collect(self.group, self.timeout, lambda: {"value": _pack(make())}, failure)
        return [_unpack(facts["value"]) for facts in told]

    def share_here(self, make: Callable[[], T], failure: str) -> T:
        """Calls ``make`` on every rank and returns this rank's result, once all have theirs.

        For results that stay where they are. Raises as :meth:`share` does.
        """
        own: list[T] = []
        self.share(lambda: own.append(make()), failure)
        return own[0]

    def from_first(self, make: Callable[[], T], failure: str) -> T:
        """Calls ``make`` on the first rank and returns its result on every rank.

        Raises as :meth:`share` does.
        """
        (found, *_) = self.share(lambda: make() if self.is_first else None, failure)
        return found  # type: ignore[return-value]


def alone() -> PipelineGroup:
    """Returns a group of one rank, for an unsplit model."""
    return LoopbackGroup(LoopbackHubs(1, 0.0, 0.0), 0)


def _pack(value: object) -> str:
    # Plans of thousands of similar entries shrink to a twentieth.
    return base64.b85encode(zlib.compress(pickle.dumps(value), 1)).decode()


def _unpack(text: str) -> T:  # type: ignore[type-var]
    value: T = pickle.loads(zlib.decompress(base64.b85decode(text)))
    return value
