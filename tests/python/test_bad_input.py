"""Mistakes in calls of step(): every rank raises, within seconds, and the next step works."""

from __future__ import annotations

import pytest
from mistakes import MISTAKES, make_mistake
from outcomes import Outcome, outcomes


def check(name: str, results: list[Outcome]) -> None:
    mistake = MISTAKES[name]
    culprits = range(len(results)) if mistake.culprits is None else mistake.culprits
    for rank, result in enumerate(results):
        assert not result.error, f"rank {rank}: {result.error}: {result.text}"
        outcome, next_is_right = result.value
        assert outcome.error, f"rank {rank} did not raise"
        assert outcome.seconds < 5.0, f"rank {rank} took {outcome.seconds} s"
        if rank in culprits:
            assert outcome.is_a(mistake.error), f"rank {rank}: {outcome.error}: {outcome.text}"
            assert outcome.cause == mistake.cause, f"rank {rank}: {outcome.cause}"
        else:
            assert outcome.error == "PipelineError", f"rank {rank}: {outcome.error}"
            assert f"rank {culprits[0]}" in outcome.text
        for part in mistake.parts:
            assert part in outcome.text, f"rank {rank}: no {part!r} in: {outcome.text}"
        assert next_is_right, f"rank {rank}: the step after the mistake is wrong"


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    check(name, outcomes(make_mistake, MISTAKES[name].num_ranks, args=(name,)))
