"""What holds for trainers over two pipelines of two ranks, whoever they are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Found = list[dict[str, Any]]  # by rank of the default group


def check_seeds(found: Found) -> None:
    """Ranks of one pipeline draw the same random numbers, and other ones than the other's."""
    first, second, *others = [each["seed"] for each in found]
    assert first == second and others[0] == others[1] != first


def check_failures(found: Found, raised: Mapping[str, tuple[int, str, str]]) -> None:
    """What one rank raised, (rank, error, text), is told to those of both pipelines."""
    for name, (place, error, text) in raised.items():
        for rank, outcome in enumerate(each[name] for each in found):
            assert outcome.error == (error if rank == place else "PipelineError"), outcome
            assert outcome.seconds < 20
            is_beside = rank // 2 != place // 2
            assert text in outcome.text, outcome
            assert not is_beside or f"replica {place // 2}" in outcome.text, outcome


def check_other_batches(found: Found) -> None:
    """Batches that differ between the replicas are refused."""
    for outcome in (each for own in found for each in own["other batches"]):
        assert outcome.is_a("ValueError"), outcome
        assert "replica 1 was given another batch than replica 0" in outcome.text
        assert outcome.seconds < 20


def check_refused(found: Found, text: str, error: str) -> None:
    """On every rank, with an error that has the text."""
    for outcome in (each[text] for each in found):
        assert outcome.is_a(error), outcome
        assert text in outcome.text and outcome.seconds < 20
