"""The ranks of one pipeline: processes of a torch process group, or threads of one process."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from operator import index
from typing import TypeVar, final

import torch.distributed as dist

from dualpipe_ext import _C
from dualpipe_ext._cuda import gpu_engine, gpu_options, gpu_thread_engine
from dualpipe_ext._transport import EngineSettings
from dualpipe_ext.host_groups import host_group

__all__ = [
    "FaultInjector",
    "LoopbackGroup",
    "PipelineGroup",
    "has_group",
    "is_first_rank",
    "resolve_group",
]

FaultInjector = Callable[[int, int, _C.MessageKind, int, int], _C.Fault]

T = TypeVar("T")

_current = threading.local()


class PipelineGroup(ABC):
    """What a pipeline requires of the ranks that it runs on.

    Attributes:
        rank: this rank's position in the pipeline, from 0.
        size: the number of ranks.
        are_threads: whether several ranks share this process, and with it torch's generator.
        rank_mapping: the position in the pipeline of each rank of the process group; must be the
            same on all ranks. Empty for threads.
    """

    rank: int
    size: int
    are_threads: bool = False
    rank_mapping: Sequence[int] = ()

    @abstractmethod
    def connect(self, timeout: float) -> None:
        """Connects the ranks within ``timeout`` seconds; called before the first engine is made."""

    @abstractmethod
    def make_engine(self, settings: EngineSettings) -> _C.Engine:
        """Makes an engine for this rank; all ranks make theirs in the same order."""

    @abstractmethod
    def all_gather(self, text: str, timeout: float) -> list[str]:
        """Returns every rank's text, by rank.

        Raises PipelineError if some are missing after ``timeout`` seconds.
        """

    def all_gather_floats(self, values: Sequence[float], timeout: float) -> list[list[float]]:
        """Returns every rank's numbers, by rank, bit for bit; all ranks give equally many.

        Raises PipelineError if some are missing after ``timeout`` seconds.
        """
        texts = self.all_gather(" ".join(value.hex() for value in values), timeout)
        return [[float.fromhex(word) for word in text.split()] for text in texts]


class LoopbackHubs:
    """The hubs that the threads of one process share: one for texts, and one for each pipeline."""

    def __init__(
        self,
        num_ranks: int,
        link_latency: float,
        link_bandwidth: float,
        faults: FaultInjector | None = None,
    ) -> None:
        self.num_ranks = num_ranks
        self._link = (link_latency, link_bandwidth)
        self._faults = faults
        self._lock = threading.Lock()
        self._hubs: list[_C.LoopbackHub] = []

    def hub(self, index: int) -> _C.LoopbackHub:
        """Returns the hub with this index, which is made when it is first asked for."""
        with self._lock:
            while len(self._hubs) <= index:
                self._hubs.append(_C.LoopbackHub(self.num_ranks, *self._link))
                # The stub widens the types of the ints that the injector is called with.
                self._hubs[-1].inject(self._faults)  # type: ignore[arg-type]
            return self._hubs[index]


@final
class LoopbackGroup(PipelineGroup):
    """Ranks that are threads of one process; made by :func:`dualpipe_ext.testing.run_ranks`."""

    def __init__(self, hubs: LoopbackHubs, rank: int) -> None:
        self.rank = rank
        self.size = hubs.num_ranks
        self.are_threads = self.size > 1
        self._hubs = hubs
        self._talk = hubs.hub(0)  # for texts; pipelines use the hubs after it
        self._num_hubs = 1
        self._engines: list[weakref.ref[_C.Engine]] = []

    def connect(self, timeout: float) -> None:
        """Does nothing: the threads share the hubs."""

    def make_engine(self, settings: EngineSettings) -> _C.Engine:
        """Makes this rank's engine on the next hub; every thread does so, in the same order."""
        hub = self._hubs.hub(self._num_hubs)
        self._num_hubs += 1  # even if this rank alone cannot make an engine
        if settings.gpu is None:
            engine = _C.Engine.loopback(hub, self.rank, settings.timeout)
        else:
            options = gpu_options(settings.gpu)
            engine = gpu_thread_engine(hub, self.rank, options, settings.timeout)
        self._engines.append(weakref.ref(engine))
        return engine

    def all_gather(self, text: str, timeout: float) -> list[str]:
        """Returns the texts of all ranks, by rank; waits for them at most ``timeout`` seconds."""
        return self._talk.all_gather(self.rank, text, timeout)

    def leave(self, text: str) -> None:
        """Tells the others that this rank is gone, and why, so that they do not wait for it."""
        self._talk.control_plane(self.rank).report(self.rank, 0, text)
        for engine in (reference() for reference in self._engines):
            if engine is not None:
                engine.fail(text, is_step=False)

    def __enter__(self) -> LoopbackGroup:
        """Makes this the default group of pipelines that this thread makes."""
        _current.group = self
        return self

    def __exit__(self, *_: object) -> None:
        _current.group = None


class _ProcessGroup(PipelineGroup):
    """Ranks that are processes, over a torch process group."""

    def __init__(self, group: dist.ProcessGroup, rank_mapping: Sequence[int] | None) -> None:
        self.size = group.size()
        self._group = group
        mapping = [index(r) for r in (range(self.size) if rank_mapping is None else rank_mapping)]
        if sorted(mapping) != list(range(self.size)):
            raise ValueError(
                f"rank_mapping={mapping}: it must name every rank from 0 to {self.size - 1} once: "
                f"entry i is the place in the pipeline of the group's rank i"
            )
        self.rank = mapping[group.rank()]
        self.rank_mapping = mapping
        self._group_ranks = [mapping.index(rank) for rank in range(self.size)]
        # By the group's ranks: positions may be wrong until the ranks have compared their mappings.
        self._texts = _C.StoreExchange(group, group.rank())

    def connect(self, timeout: float) -> None:
        host_group(self._group, timeout)

    def make_engine(self, settings: EngineSettings) -> _C.Engine:
        peers = list(settings.peers)
        if settings.gpu is None:
            return _C.Engine.process_group(
                host_group(self._group), self.rank, self._group_ranks, peers, settings.timeout
            )
        return gpu_engine(
            host_group(self._group),
            self.rank,
            self._group_ranks,
            peers,
            gpu_options(settings.gpu),
            settings.timeout,
        )

    def all_gather(self, text: str, timeout: float) -> list[str]:
        return self._by_position(self._texts.all_gather(text, timeout))

    def all_gather_floats(self, values: Sequence[float], timeout: float) -> list[list[float]]:
        gathered = _C.process_group_all_gather(host_group(self._group), values, timeout)
        return self._by_position(gathered)

    def _by_position(self, values: list[T]) -> list[T]:
        return [values[self._group_ranks[rank]] for rank in range(self.size)]


def has_group(process_group: dist.ProcessGroup | PipelineGroup | None) -> bool:
    """Whether :func:`resolve_group` would find a group."""
    known = process_group or getattr(_current, "group", None)
    return known is not None or dist.is_initialized()


def is_first_rank(process_group: dist.ProcessGroup | PipelineGroup | None) -> bool:
    """Whether this is the first rank of a new pipeline's group; true if there is no group."""
    group = process_group or getattr(_current, "group", None)
    if isinstance(group, PipelineGroup):
        return group.rank == 0
    return not has_group(group) or dist.get_rank(group) == 0


def resolve_group(
    process_group: dist.ProcessGroup | PipelineGroup | None, rank_mapping: Sequence[int] | None
) -> PipelineGroup:
    """Returns the group of a new pipeline: the one given, this thread's, or torch's default.

    Raises:
        ValueError: there is no group, or ``rank_mapping`` is not a permutation of its ranks, or is
            given for threads.
        TypeError: ``process_group`` is not a process group.
    """
    group = process_group or getattr(_current, "group", None)
    if group is None:
        if not dist.is_initialized():
            raise ValueError(
                "there is no process group: call torch.distributed.init_process_group() first, "
                "pass process_group=, or run under dualpipe_ext.testing.run_ranks()"
            )
        group = dist.group.WORLD
    if isinstance(group, PipelineGroup):
        if rank_mapping is not None:
            raise ValueError("rank_mapping is for process groups; threads have the ranks they have")
        return group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed ProcessGroup; found {type(group).__name__}"
        )
    return _ProcessGroup(group, rank_mapping)
