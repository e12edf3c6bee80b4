"""What ranks tell one another after a step, in one exchange."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from dualpipe_ext.groups import PipelineGroup

__all__ = ["NO_BATCH", "Report", "summarize"]

NO_BATCH = -1.0


@dataclass(frozen=True)
class Report:
    """The report of one rank, or of all ranks.

    Attributes:
        loss: this rank's share of the batch loss; after :func:`summarize`, the whole loss.
        fingerprint: that of the batch that this rank was given, or ``NO_BATCH``.
        are_finite: whether the gradients are finite.
    """

    loss: float
    fingerprint: float = NO_BATCH
    are_finite: bool = True


def summarize(group: PipelineGroup, own: Report, timeout: float) -> Report:
    """Combines the reports of all ranks into one, the same on each of them.

    Raises:
        ValueError: ranks were given different batches.
        PipelineError: a report is missing after ``timeout`` seconds.
    """
    values = [float(value) for value in astuple(own)]
    gathered = group.all_gather_floats(values, timeout)
    losses, fingerprints, are_finite = zip(*gathered, strict=True)
    first = fingerprints[0]
    for rank, found in enumerate(fingerprints):
        if found != first:
            raise ValueError(
                f"rank {rank} was given another batch than rank 0; give every rank the same one (the "
                f"same seed or sampler), or with halves=True the rows that enter and leave there"
            )
    return Report(math.fsum(losses), first, all(are_finite))
