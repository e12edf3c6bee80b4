"""Which samples of a data set make the batches of one replica."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler, default_collate

from dualpipe_ext.training.rows import even_part, even_parts

__all__ = ["ReplicaBatchSampler", "collate_rows"]


def collate_rows(samples: list[Any]) -> Any:
    """A batch as ``DataLoader`` makes it; ``None`` of no samples.

    For a ``DataLoader(collate_fn=...)`` whose sampler has ``rows=``: on some ranks none are read.
    """
    return default_collate(samples) if samples else None


class ReplicaBatchSampler(Sampler[list[int]]):
    """Batches of indices for a ``DataLoader(batch_sampler=...)`` on each rank of a replica.

    Batch k of all replicas together is batch k of training in one piece: each replica has its share
    of the same batch, no sample is repeated and none left out. (torch's ``DistributedSampler``
    repeats some where the replicas do not come out even.)

    Args:
        num_samples: of the data set.
        batch_size: of all replicas together.
        replica: which one this is, of ``num_replicas``.
        num_replicas: how many there are.
        shuffle: in an order that ``seed`` and the epoch decide, the same on every rank.
        seed: of the order.
        drop_last: leave out the last batch where it is smaller. Otherwise a replica has none where
            it comes to less than one sample for each: ``evaluate()`` takes loaders of different
            lengths, ``train_step()`` does not; the other replicas would wait for this one.
        rows: of the rows of a replica's batch, those to read: for ``train_step(...,
            halves=True)``, where inputs and labels of different rows are read
            (:meth:`dualpipe_ext.TrainingWrapper.own_rows`). Batches of none are lists of none.

    Raises:
        ValueError: sizes that do not fit.
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
        """Decides the order of the next pass; call it alike on every rank."""
        self._epoch = epoch

    def __len__(self) -> int:
        """How many batches a pass has."""
        whole, rest = divmod(self._num_samples, self._batch_size)
        last = 0 if self._drop_last else even_parts(rest, self._num_replicas)[self._replica]
        return whole + (last > 0)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of one pass."""
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
