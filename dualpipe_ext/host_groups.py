"""Process groups for data in host memory, beside groups that serve only GPUs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from dualpipe_ext import _C

__all__ = ["TIMEOUT_S", "group_at", "host_group", "reaching"]

TIMEOUT_S = 1800.0  # torch's default for gloo: a rank may take long to write a file
_LONGEST_S = 10 * 365 * 86400.0  # as good as none: an endless one has no timedelta

_made: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def host_group(group: dist.ProcessGroup, timeout: float | None = None) -> dist.ProcessGroup:
    """Returns the group for data in host memory: ``group``, or one over gloo if it has only GPUs.

    The group over gloo has the same ranks, all of which make it together at the first call. It is
    not made by ``torch.distributed.new_group()``, which names a group of only some ranks by how
    many groups each of them has, and hangs if these numbers differ. Torch's collectives accept it
    if their roots are given as ranks of the group (``group_src``, ``group_dst``); call them within
    :func:`reaching`.

    Args:
        group: a torch process group.
        timeout: how many seconds the other ranks may take to join the first call.

    Raises:
        PipelineError: the other ranks cannot be reached.
    """
    if _C.has_cpu_backend(group):
        return group
    if group not in _made:
        with reaching("the others over gloo"):
            _made[group] = _make(group, timeout or TIMEOUT_S)
    return _made[group]


def group_at(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Returns the group for tensors on a device."""
    return host_group(group) if device.type == "cpu" else group


@contextmanager
def reaching(whom: str) -> Iterator[None]:
    """Turns the errors of torch's collectives, which say little, into ``PipelineError``."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise _C.PipelineError(f"cannot reach {whom}: {_cause(error)}") from error


def _cause(error: BaseException) -> BaseException:
    """Returns the original error: torch raises another, as it finds no name of the group to log."""
    while isinstance(error, ValueError) and error.__context__ is not None:
        error = error.__context__
    return error


def _make(group: dist.ProcessGroup, timeout: float) -> dist.ProcessGroup:
    rank, size = group.rank(), group.size()
    # A group that is made again may have the store of an earlier one, so each has a number. Every
    # rank counts for itself, and for each size of group separately.
    known = PrefixStore(f"dualpipe_ext/hosts of {size}", group.get_group_store())
    number = known.add(str(rank), 1)
    store = PrefixStore(str(number), known)
    kind = dist.ProcessGroup.BackendType.GLOO
    limit = timedelta(seconds=min(timeout, _LONGEST_S))
    gloo = dist.ProcessGroupGloo(store, rank, size, limit)
    gloo._set_default_timeout(timedelta(seconds=TIMEOUT_S))  # for all later exchanges
    made = dist.ProcessGroup(store, rank, size)
    made._set_default_backend(kind)
    made._register_backend(torch.device("cpu"), kind, gloo)
    return made
