"""The Python face of schedules: what it returns, and what it says about mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dualpipe_ext.schedule import (
    Action,
    CostModel,
    Schedule,
    ScheduleError,
    Span,
    parse_action,
    plan,
    schedules,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_plan_says_what_it_is() -> None:
    schedule = plan("dualpipe", num_ranks=4, num_microbatches=8)
    assert schedule.name == "dualpipe"
    assert schedule.placement == "bidirectional"
    assert (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches) == (4, 4, 8)
    assert schedule.actions(0)[:4] == ["0F0", "0F1", "0F2", "3F4"]
    assert schedule.stages_of(1) == [1, 2]
    assert schedule.mirror_of(1) == 2
    assert plan("1f1b", 4, 8).mirror_of(1) is None
    assert [schedule.peak_activations(rank) for rank in range(4)] == [5, 5, 5, 5]
    assert repr(schedule) == (
        "Schedule('dualpipe', num_ranks=4, num_stages=4, num_microbatches=8, "
        "placement='bidirectional')"
    )


def test_equal_schedules_are_equal() -> None:
    assert plan("zbv", 4, 8) == plan("zbv", 4, 8)
    assert hash(plan("zbv", 4, 8)) == hash(plan("zbv", 4, 8))
    assert plan("zbv", 4, 8) != plan("zbv", 4, 9)
    assert plan("zbv", 4, 8) != "zbv"


def test_all_schedules_are_listed_and_can_be_planned() -> None:
    names = [info.name for info in schedules()]
    assert names == ["dualpipe", "dualpipev", "1f1b", "zb1p", "zbv", "gpipe", "interleaved_1f1b"]
    for info in schedules():
        schedule = plan(info.name, 4, 8)
        assert schedule.placement == info.placement
        assert info.stages_per_rank in (0, len(schedule.stages_of(0)))
        assert info.summary


def test_lowering_adds_messages_and_is_proved() -> None:
    schedule = plan("dualpipe", 4, 8)
    lowered = schedule.lower(reduce_gradients=True)
    lowered.verify()
    assert lowered.diagnostics() == []
    assert lowered.actions(0)[:2] == ["0F0", "0SEND_F0"]
    assert lowered.actions(0)[-1] == "0REDUCE_GRAD"
    kept = schedule.lower(keep_overlap=True).actions(1)
    assert "(1F3;2B5)OVERLAP_F_B" in kept
    inference = schedule.lower(with_backward=False).actions(1)
    assert not [text for text in inference if "B" in text or "W" in text]


@pytest.mark.parametrize("lookahead", [0, 1, 7])
def test_receives_are_posted_ahead(lookahead: int) -> None:
    lowered = plan("1f1b", 2, 16).lower(lookahead=lookahead)
    actions = lowered.actions(1)
    posted = actions.index("1RECV_F10")
    used = actions.index("1F10")
    between = [text for text in actions[posted:used] if "RECV" not in text and "SEND" not in text]
    assert len(between) == lookahead


def gets_through_device_wide_waits(lowered: Schedule) -> bool:
    """Whether all ranks end where each computation waits for every receive posted before it."""
    left = [lowered.actions(rank) for rank in range(lowered.num_ranks)]
    sent: set[tuple[str, int, int]] = set()
    posted: list[set[tuple[str, int, int]]] = [set() for _ in left]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(left):
            while actions:
                message = re.fullmatch(r"(\d+)(SEND|RECV)_([FB])(\d+)", actions[0])
                if message is None and not posted[rank] <= sent:
                    break
                if message is not None:
                    stage, what, kind, microbatch = message.groups()
                    towards = {"F": -1, "B": 1}[kind] if what == "RECV" else 0
                    key = (kind, int(stage) + towards, int(microbatch))
                    (sent if what == "SEND" else posted[rank]).add(key)
                actions.pop(0)
                moved = True
    return not any(left)


@pytest.mark.parametrize("name", [info.name for info in schedules()])
def test_receives_posted_where_they_are_used_stand_device_wide_waits(name: str) -> None:
    """As torch.cuda.synchronize() in a stage is one: what GPU ranks are planned for by default."""
    for num_ranks, num_microbatches in ((2, 8), (4, 12), (8, 24)):
        schedule = plan(name, num_ranks, num_microbatches)
        assert gets_through_device_wide_waits(schedule.lower(lookahead=0))


def test_receives_posted_ahead_do_not_stand_device_wide_waits() -> None:
    assert not gets_through_device_wide_waits(plan("dualpipe", 4, 12).lower(lookahead=1))


def test_the_simulated_bubble_is_half_the_published_one() -> None:
    for num_ranks, late in ((4, 2.0), (8, 6.0), (16, 14.0)):
        schedule = plan("dualpipe", num_ranks, 2 * num_ranks + 4)
        published = schedule.simulate(CostModel(), sends="late")
        ours = schedule.simulate(CostModel(), sends="early")
        for rank in range(num_ranks):
            assert published.bubble(rank) == late
            assert ours.bubble(rank) == late / 2
            assert ours.busy(rank) == 3 * schedule.num_microbatches
            assert ours.makespan == ours.busy(rank) + ours.bubble(rank)
            assert ours.peak_activations(rank) == num_ranks + 1


def test_stages_may_take_different_times() -> None:
    costs = CostModel(forward=[1, 4], backward_input=(2.0, 3.0), backward_weight=0.5)
    timeline = plan("gpipe", 2, 2).simulate(costs)
    assert timeline.makespan == 1 + 2 * 4 + (3 + 0.5 + 3) + (2 + 0.5)  # 0B1 waits for 1I1
    assert timeline.busy(0) == 2 * (1 + 2 + 0.5)
    assert timeline.busy(1) == 2 * (4 + 3 + 0.5)


def test_actions_are_read_from_their_text() -> None:
    assert parse_action("3SEND_F12") == [Action("SEND_F", 3, 12)]
    assert parse_action("(0F7;7I13)OVERLAP_F_B") == [Action("F", 0, 7), Action("I", 7, 13)]
    assert parse_action("3REDUCE_GRAD") == [Action("REDUCE_GRAD", 3, None)]
    with pytest.raises(ScheduleError, match=r"column 2: .*3Q12"):
        parse_action("3Q12")


def test_a_timeline_has_spans_and_a_trace(tmp_path: Path) -> None:
    timeline = plan("1f1b", 2, 2).simulate(CostModel(latency=0.5), sends="late")
    assert timeline.num_ranks == 2
    assert timeline.spans(1)[0] == Span("1F0", 1.5, 2.5)
    path = tmp_path / "trace.json"
    timeline.to_chrome_trace(path, microseconds_per_unit=10)
    events = json.loads(path.read_text())["traceEvents"]
    first = next(event for event in events if event["name"] == "1F0")
    assert (first["ph"], first["tid"], first["ts"], first["dur"]) == ("X", 1, 15, 10)
    assert len([event for event in events if event["ph"] == "X"]) == 8


def test_grids_are_drawn() -> None:
    schedule = plan("1f1b", 2, 2)
    assert schedule.grid().splitlines() == [
        "step   | 0   1   2   3",
        "rank 0 | 0F0 0F1 0B0 0B1",
        "rank 1 | 1F0 1B0 1F1 1B1",
    ]
    assert ">1B0<" in schedule.grid(rank=1, step=1)
    assert schedule.simulate(sends="late").grid().splitlines() == [
        "rank 0 |0F0 0F1 ........0B0     ....0B1     |",
        "rank 1 |....1F0 1B0     1F1 1B1     ........|",
    ]


def test_a_file_round_trips(tmp_path: Path) -> None:
    schedule = plan("dualpipe", 4, 8)
    path = tmp_path / "mine.csv"
    schedule.to_csv(path)
    assert path.read_text() == (GOLDEN / "dualpipe_p4_n8.csv").read_text()
    read = Schedule.from_csv(path, placement="bidirectional")
    assert read.name == "mine"  # the name is no part of the content
    assert read == schedule and hash(read) == hash(schedule)
    assert Schedule.from_csv(GOLDEN / "zbv_p4_n8.csv", placement="v").num_stages == 8
    interleaved = Schedule.from_csv(GOLDEN / "interleaved_1f1b_p4_n8.csv", num_stages=8)
    assert interleaved.actions(2) == plan("interleaved_1f1b", 4, 8).actions(2)


@pytest.mark.parametrize(
    ("name", "sizes", "parts"),
    [
        ("dualpipe", (3, 8), ["num_ranks is 3", "even", "use 4"]),
        ("dualpipe", (4, 9), ["num_microbatches is 9", "even", "use 10"]),
        ("dualpipe", (4, 6), ["num_microbatches is 6", "at least 2 * num_ranks = 8"]),
        ("dualpipev", (4, 7), ["num_microbatches is 7", "at least 2 * num_ranks = 8"]),
        ("interleaved_1f1b", (4, 11), ["num_microbatches is 11", "use 8 or 12"]),
        ("1f1b", (0, 4), ["num_ranks is 0"]),
        ("1f1b", (4, 8, 2), ["stages_per_rank is 2", "leave it out"]),
        ("dualpype", (4, 8), ['unknown schedule "dualpype"', "dualpipe, dualpipev, 1f1b"]),
    ],
)
def test_sizes_that_cannot_be_served(name: str, sizes: tuple[int, ...], parts: list[str]) -> None:
    with pytest.raises(ScheduleError) as caught:
        plan(name, *sizes)
    assert isinstance(caught.value, ValueError)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0F0,0B0\n1F0, 1Q0\n", ["line 2, column 7", '"1Q0"']),
        ("0F0,0B0\n1F0,1B01\n", ["line 2, column 7", "without leading zeros"]),
        ("0F0,0B0\n1F0\n", ["rank 1", "1I0 is missing"]),
        ("0F0,0B0\n\n1F0,1B0\n", ["line 2, column 1", "rank 1 has no actions"]),
        ("0B0,0F0\n1F0,1B0\n", ["rank 0, step 0", "0B0 comes before 0F0", ">0B0<"]),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", ["0B0 waits for rank 1", "cycle"]),
        ("", ["empty"]),
    ],
)
def test_files_that_do_not_hold(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv(path)
    for part in parts:
        assert part in str(caught.value)


def test_other_mistakes() -> None:
    schedule = plan("1f1b", 2, 2)
    with pytest.raises(TypeError, match="num_ranks='2': it must be an int"):
        plan("1f1b", "2", 2)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match=f"num_microbatches={2**40} is too large"):
        plan("1f1b", 2, 2**40)
    with pytest.raises(ValueError, match=r"rank is 2; it must be in 0\.\.1"):
        schedule.actions(2)
    with pytest.raises(ValueError, match=r"rank is -1"):
        schedule.simulate().bubble(-1)
    with pytest.raises(ValueError, match='sends is \'soon\'; use "early" or "late"'):
        schedule.simulate(sends="soon")  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="forward is -1"):
        schedule.simulate(CostModel(forward=-1))
    with pytest.raises(ScheduleError, match="forward has 3 durations for 2 stages"):
        schedule.simulate(CostModel(forward=[1, 1, 1]))
    with pytest.raises(ScheduleError, match="lookahead is -1"):
        schedule.lower(lookahead=-1)
    with pytest.raises(ScheduleError, match="once"):
        schedule.lower().lower()
    with pytest.raises(ScheduleError, match="cannot be simulated"):
        schedule.lower().simulate()
