"""What holds for every schedule, on sizes and texts that nobody picked."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dualpipe_ext.schedule import CostModel, Schedule, ScheduleError, plan

names = st.sampled_from(["1f1b", "zb1p", "gpipe", "zbv", "dualpipev", "dualpipe"])


@st.composite
def plans(draw: st.DrawFn) -> Schedule:
    name = draw(names)
    num_ranks = draw(st.integers(1, 6))
    num_microbatches = draw(st.integers(1, 12))
    if name.startswith("dualpipe"):
        num_microbatches += 2 * num_ranks
    if name == "dualpipe":
        num_ranks, num_microbatches = 2 * num_ranks, 4 * num_ranks + 2 * (num_microbatches // 2)
    return plan(name, num_ranks, num_microbatches)


@given(plans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_csv_round_trips(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule, lowered: bool
) -> None:
    if lowered:
        schedule = schedule.lower()
    path = Path(tmp_path_factory.getbasetemp()) / f"{schedule.name}.csv"
    schedule.to_csv(path)
    assert Schedule.from_csv(path, schedule.placement) == schedule


@given(plans(), st.integers(0, 6), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_lowering_is_proved(
    schedule: Schedule, lookahead: int, keep_overlap: bool, with_backward: bool
) -> None:
    lowered = schedule.lower(
        lookahead=lookahead, keep_overlap=keep_overlap, with_backward=with_backward
    )
    assert lowered.diagnostics() == []


@given(plans(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_dropped_action_is_found(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule, data: st.DataObject
) -> None:
    assume(schedule.num_microbatches > 1)  # a forward alone is inference
    rows = [schedule.actions(rank) for rank in range(schedule.num_ranks)]
    row = data.draw(st.sampled_from([row for row in rows if len(row) > 1]))
    del row[data.draw(st.integers(0, len(row) - 1))]
    path = Path(tmp_path_factory.getbasetemp()) / "dropped.csv"
    path.write_text("\n".join(",".join(row) for row in rows))
    with pytest.raises(ScheduleError):
        Schedule.from_csv(path, schedule.placement)


durations = st.floats(0.125, 8, allow_nan=False)


@given(plans(), durations, durations, durations, st.floats(0, 2))
@settings(max_examples=60, deadline=None)
def test_time_adds_up(
    schedule: Schedule, forward: float, backward_input: float, backward_weight: float, wait: float
) -> None:
    costs = CostModel(
        forward=forward,
        backward_input=backward_input,
        backward_weight=backward_weight,
        latency=wait,
    )
    timeline = schedule.simulate(costs)
    work = schedule.num_microbatches * (forward + backward_input + backward_weight)
    for rank in range(schedule.num_ranks):
        stages = len(schedule.stages_of(rank)) if schedule.placement == "v" else 1
        assert timeline.busy(rank) == pytest.approx(stages * work)
        spans = timeline.spans(rank)
        assert all(a.end <= b.start for a, b in pairwise(spans))
        assert timeline.makespan >= spans[-1].end


@given(st.text(alphabet="0123456789FBIWSENDRCV_OLAP();, \n", max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_schedule_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "any.csv"
    path.write_text(text)
    try:
        schedule = Schedule.from_csv(path)
    except ScheduleError as error:
        assert str(error)
    else:
        assert schedule.diagnostics() == []
