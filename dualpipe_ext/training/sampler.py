"""Which samples of a data set make the batches of one replica."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler, default_collate

from dualpipe_ext.training.rows import even_part, even_parts

__all__ = ["ReplicaBatchSampler", "collate_rows"]


def collate_rows(samples: list[Any]) -> Any:
    """Collates samples as ``DataLoader`` does; returns ``None`` if there are none.

    For ``DataLoader(collate_fn=...)`` with a sampler that has ``rows=``: some ranks read no
    samples.
    """
    return default_collate(samples) if samples else None


class ReplicaBatchSampler(Sampler[list[int]]):
    """Batches of indices for a ``DataLoader(batch_sampler=...)`` on each rank of a replica.

    Batch k of all replicas together is batch k of training in one piece: each replica has its share
    of the same batch, no sample is repeated and none is left out. (torch's ``DistributedSampler``
    repeats samples if they do not divide evenly among replicas.)

    Args:
        num_samples: the number of samples of the data set.
        batch_size: the size of a batch of all replicas together.
        replica: the number of this replica.
        num_replicas: the number of replicas.
        shuffle: use an order that ``seed`` and the epoch determine, the same on every rank.
        seed: the seed of the order.
        drop_last: leave out the last batch if it is smaller. Otherwise some replicas have no last
            batch if it has fewer samples than there are replicas. ``evaluate()`` accepts loaders of
            different lengths; ``train_step()`` does not, as the other replicas would wait.
        rows: takes the number of rows of a replica's batch, and returns those to read. For
            ``train_step(..., halves=True)``, which takes inputs and labels of different rows
            (:meth:`dualpipe_ext.TrainingWrapper.own_rows`). A batch without rows is an empty list.

    Raises:
        ValueError: ``replica`` or ``batch_size`` is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        replica: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        rows: Callable[[int], range] | None = None,
    ) -> None:
        if not 0 <= replica < num_replicas:
            raise ValueError(f"replica={replica}: it must be from 0 to {num_replicas - 1}")
        if not num_replicas <= batch_size <= num_samples:
            raise ValueError(
                f"batch_size={batch_size}: it is that of all {num_replicas} replicas together, and "
                f"the data set has {num_samples} samples; choose one in between"
            )
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._replica = replica
        self._num_replicas = num_replicas
        self._shuffle = shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._rows = rows
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the order of the next pass; call it alike on every rank."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Returns the number of batches of a pass."""
        whole, rest = divmod(self._num_samples, self._batch_size)
        last = 0 if self._drop_last else even_parts(rest, self._num_replicas)[self._replica]
        return whole + (last > 0)

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the batches of one pass."""
        order = self._order()
        for number in range(len(self)):
            batch = order[number * self._batch_size :][: self._batch_size]
            own = even_part(len(batch), self._replica, self._num_replicas)
            share = batch[own.start : own.stop]
            rows = range(len(share)) if self._rows is None else self._rows(len(share))
            yield [share[row] for row in rows]

    def _order(self) -> list[int]:
        if not self._shuffle:
            return list(range(self._num_samples))
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order: list[int] = torch.randperm(self._num_samples, generator=generator).tolist()
        return order
