"""Mistakes in calls of step(): every rank raises, within seconds, and the next step works."""

from __future__ import annotations

import pytest
from mistakes import MISTAKES, check_mistake, make_mistake
from outcomes import outcomes

pytestmark = pytest.mark.measures  # failures are told within seconds


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    check_mistake(name, outcomes(make_mistake, MISTAKES[name].num_ranks, args=(name,)))
