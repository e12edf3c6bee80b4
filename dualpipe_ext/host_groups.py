"""Process groups for what is in host memory, beside groups that serve GPUs alone."""

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

TIMEOUT_S = 1800.0  # as torch's for gloo: a rank may take long to write a file

_made: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def host_group(group: dist.ProcessGroup, timeout: float | None = None) -> dist.ProcessGroup:
    """The group for what is in host memory: itself, or one of gloo where it serves GPUs alone.

    That one has the same ranks and is made at the first call, by all of them together. It is no
    ``torch.distributed.new_group()``, which names a group of some ranks alone by how many groups
    each of them has, and hangs where these numbers differ. Torch's collectives take it where their
    roots are ranks of the group (``group_src``, ``group_dst``), within :func:`reaching`.

    Args:
        group: a group of torch.
        timeout: seconds that the others may take to come to the first call.

    Raises:
        PipelineError: they cannot be reached.
    """
    if _C.has_cpu_backend(group):
        return group
    if group not in _made:
        with reaching("the others over gloo"):
            _made[group] = _make(group, timeout or TIMEOUT_S)
    return _made[group]


def group_at(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """The group for tensors on a device."""
    return host_group(group) if device.type == "cpu" else group


@contextmanager
def reaching(whom: str) -> Iterator[None]:
    """Turns the errors of torch's collectives, which say little, into PipelineError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise _C.PipelineError(f"cannot reach {whom}: {_cause(error)}") from error


def _cause(error: BaseException) -> BaseException:
    """The error itself: torch raises another one, as it finds no name of the group to report."""
    while isinstance(error, ValueError) and error.__context__ is not None:
        error = error.__context__
    return error


def _make(group: dist.ProcessGroup, timeout: float) -> dist.ProcessGroup:
    rank, size = group.rank(), group.size()
    # A group that is made again may have the store of an earlier one: each has a number, which is
    # counted for every rank, and starts anew where there are other ranks to count for.
    known = PrefixStore(f"dualpipe_ext/hosts of {size}", group.get_group_store())
    number = known.add(str(rank), 1)
    store = PrefixStore(str(number), known)
    kind = dist.ProcessGroup.BackendType.GLOO
    gloo = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))
    gloo._set_default_timeout(timedelta(seconds=TIMEOUT_S))  # of what is exchanged from now on
    made = dist.ProcessGroup(store, rank, size)
    made._set_default_backend(kind)
    made._register_backend(torch.device("cpu"), kind, gloo)
    return made
