"""What the engine counted and measured: actions, live activations, times, weight splits."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, squared_error
from parity import Job, own_batch, own_stages, run_job
from torch import Tensor, nn

from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline, TraceEvent
from dualpipe_ext.schedule import parse_action
from dualpipe_ext.testing import run_ranks
from dualpipe_ext.utils import disable_profiling, enable_profiling

# (P, N) -> by rank: F, F&B, B, I, W, of the published order.
COUNTS = {
    (2, 4): {(0, 1): (3, 1, 2, 1, 1)},
    (4, 8): {(0, 3): (5, 3, 2, 3, 3), (1, 2): (5, 3, 3, 2, 2)},
    (8, 20): {
        (0, 7): (11, 9, 4, 7, 7),
        (1, 6): (10, 10, 4, 6, 6),
        (2, 5): (9, 11, 4, 5, 5),
        (3, 4): (9, 11, 5, 4, 4),
    },
}


class Overlapping(nn.Linear):
    """A stage with a function of its own, so that pairs stay one action."""

    @classmethod
    def overlapped_forward_backward(cls, *arguments):  # type: ignore[no-untyped-def]
        module0, inputs0, criterion0, labels0, _, loss1, outputs1, grads1 = arguments
        outputs = [module0(*inputs0)]
        loss = None if criterion0 is None else criterion0(*outputs, *labels0)
        if loss1 is not None:
            loss1.backward()
        else:
            torch.autograd.backward(outputs1, grads1)
        return outputs, loss


def kinds(trace: list[str]) -> Counter[str]:
    """How often each kind of action is in a trace; pairs count as one."""
    return Counter("&".join(part.op for part in parse_action(action)) for action in trace)


@pytest.mark.parametrize(("num_ranks", "num_chunks"), COUNTS)
def test_actions_of_the_published_order(num_ranks: int, num_chunks: int) -> None:
    """With stages that overlap themselves, pairs and full backwards are what they are on paper."""
    x = torch.ones(num_chunks // 2, 3)

    def rank_fn(rank: int, num_ranks: int) -> tuple[Counter[str], Counter[str]]:
        model = DualPipe([Overlapping(3, 3), Overlapping(3, 3)])
        ends = rank in (0, num_ranks - 1)
        model.step(
            x if ends else None,
            num_chunks=num_chunks,
            criterion=squared_error,
            labels=(x,) if ends else None,
        )
        plan = Job("bias", "dualpipe", num_ranks, num_chunks).plan()
        return kinds([event.action for event in model.last_trace]), kinds(plan.actions(rank))

    results = run_ranks(rank_fn, num_ranks)
    for ranks, (f, fb, b, i, w) in COUNTS[num_ranks, num_chunks].items():
        for rank in ranks:
            measured, planned = results[rank]
            assert planned == Counter({"F": f, "F&B": fb, "B": b, "I": i, "W": w})
            # The engine runs B as I and W: results leave before weights.
            assert measured["F"] == f and measured["F&B"] == fb
            assert measured["B"] + measured["I"] == b + i
            assert f + fb == b + i + fb == num_chunks


@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(2, 4), (4, 8), (4, 20), (8, 20)])
def test_every_computation_happens_once(num_ranks: int, num_chunks: int) -> None:
    for result in run_job(Job("bias", "dualpipe", num_ranks, num_chunks)):
        halves = [half for action in result.trace for half in parse_action(action)]
        counts = Counter(half.op for half in halves)
        assert counts["F"] == num_chunks
        assert counts["B"] + counts["I"] == num_chunks
        assert counts["W"] == counts["I"]
        assert len(set(halves)) == len(halves)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("more", [0, 2, 12])
def test_live_activations_of_dualpipe(num_ranks: int, more: int) -> None:
    """P+1 micro-batches on every rank, whatever N is."""
    for result in run_job(Job("bias", "dualpipe", num_ranks, 2 * num_ranks + more)):
        assert result.stats.peak_live_activations == num_ranks + 1
        assert result.stats.planned_peak_activations == num_ranks + 1


@pytest.mark.parametrize("schedule", ["dualpipev", "1f1b", "gpipe", "zb1p", "zbv"])
def test_live_activations_are_those_planned(schedule: str) -> None:
    for result in run_job(Job("bias", schedule, 4, 8)):
        assert result.stats.peak_live_activations == result.stats.planned_peak_activations


def test_activations_are_really_gone() -> None:
    """The graph of a micro-batch dies with its backward: counted by what autograd still holds."""
    live, peaks = Counter[str](), Counter[str]()

    class Held:
        def __init__(self, name: str) -> None:
            self.name = name
            live[name] += 1
            peaks[name] = max(peaks[name], live[name])

        def __del__(self) -> None:
            live[self.name] -= 1

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, name: str) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.held = Held(name)
            return x.clone()

        @staticmethod
        def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
            return grads[0], None

    class Watched(nn.Linear):
        rank_name = ""

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = Watch.apply(super().forward(x), self.rank_name)  # type: ignore[no-untyped-call]
            return y

    num_ranks, num_chunks = 4, 16

    def rank_fn(rank: int, num_ranks: int) -> None:
        stages = [Watched(3, 3), Watched(3, 3)]
        for stage in stages:
            stage.rank_name = f"rank {rank}"
        x = torch.ones(num_chunks // 2, 3) if rank in (0, num_ranks - 1) else None
        model = DualPipe(stages)
        model.step(x, num_chunks=num_chunks, criterion=squared_error, labels=(x,))

    run_ranks(rank_fn, num_ranks)
    assert all(count == 0 for count in live.values())
    assert set(peaks.values()) == {num_ranks + 1}


def test_times_and_bubbles() -> None:
    class Sleeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.002)
            y: Tensor = super().forward(x)
            return y

    def rank_fn(rank: int, num_ranks: int) -> None:
        model = DualPipe([Sleeping(3, 3), Sleeping(3, 3)])
        with pytest.raises(ValueError, match="before the first step"):
            model.stats()
        x = torch.ones(4, 3) if rank in (0, num_ranks - 1) else None
        model.step(x, num_chunks=8, criterion=squared_error, labels=(x,))
        stats, trace = model.stats(), model.last_trace
        assert 8 * 0.002 < stats.busy_seconds <= stats.step_seconds
        assert stats.measured_bubble == pytest.approx(1 - stats.busy_seconds / stats.step_seconds)
        # F = I = W = 1: 24 of the 25 units are work.
        assert stats.planned_bubble == pytest.approx(1 / 25)
        ends = [event.end for event in trace]
        assert ends == sorted(ends) and ends[-1] <= stats.step_seconds
        assert all(0 <= event.wait <= event.end - event.start for event in trace)
        busy = sum(event.end - event.start - event.wait for event in trace)
        assert busy == pytest.approx(stats.busy_seconds)

    run_ranks(rank_fn, 4)


def test_a_trace_is_drawn_above_its_plan(tmp_path: Path) -> None:
    path = tmp_path / "step.json"

    def rank_fn(rank: int, num_ranks: int) -> list[TraceEvent]:
        model = DualPipe([nn.Linear(3, 3), nn.Linear(3, 3)])
        x = torch.ones(4, 3)
        model.step(x, num_chunks=4, criterion=squared_error, labels=(x,))
        model.save_trace(path)
        trace = model.last_trace
        with torch.no_grad():
            model.step(x, num_chunks=4)
        with pytest.raises(ValueError, match="the last step was inference"):
            model.save_trace(path)
        return trace

    traces = run_ranks(rank_fn, 2)
    events = json.loads(path.read_text())["traceEvents"]
    groups = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert groups == ["measured", "planned"]
    for rank, trace in enumerate(traces):
        slices = [
            [e for e in events if (e.get("tid"), e["pid"]) == (rank, group)] for group in (0, 1)
        ]
        measured, planned = ([e for e in own if e["ph"] == "X"] for own in slices)
        computed = [e for e in measured if e["name"] != "wait"]
        assert [e["name"] for e in computed] == [event.action for event in trace]
        for event, drawn in zip(trace, computed, strict=True):
            assert drawn["ts"] + drawn["dur"] == pytest.approx(1e6 * event.end)
            assert drawn["dur"] == pytest.approx(1e6 * (event.end - event.start - event.wait))
        waits = sum(e["dur"] for e in measured if e["name"] == "wait")
        assert waits == pytest.approx(1e6 * sum(event.wait for event in trace))
        assert sorted(e["name"] for e in planned) == sorted(event.action for event in trace)
    last = [
        max(e["ts"] + e["dur"] for e in events if e["pid"] == group and "ts" in e)
        for group in (0, 1)
    ]
    assert last[1] == pytest.approx(last[0])


class Watched:
    """An engine that notes which of its steps were timed by the device."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.timed: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def time_device(self, on: bool) -> None:
        self.timed.append(on)
        self._engine.time_device(on)


def test_steps_are_timed_by_the_device_where_it_is_asked_for() -> None:
    def rank_fn(rank: int, num_ranks: int) -> list[bool]:
        model = Pipeline([nn.Linear(3, 3)], "1f1b")
        watched = Watched(model._runner._engine)
        model._runner._engine = watched  # type: ignore[assignment]
        x = torch.ones(4, 3)

        def step() -> None:
            model.step(x, num_chunks=4, criterion=squared_error, labels=(x,))
            assert model.stats().clock == "host"  # there is no other one here

        step()
        model.time_next_step()
        with torch.no_grad():  # it is a training step that is meant
            step()
        step()
        step()
        model.times_device = True
        step()
        model.times_device = False
        enable_profiling()
        try:
            step()
        finally:
            disable_profiling()
        step()
        return watched.timed

    # One rank: profiling is one for all threads of a process.
    assert run_ranks(rank_fn, 1) == [[False, True, True, False, True, True, False]]


def test_the_report_of_deferred_weights() -> None:
    job = Job("gpt", "dualpipe", 2, 4)

    def rank_fn(rank: int, num_ranks: int) -> list[tuple[str, str]]:
        on = Pipeline(own_stages(job, rank), "dualpipe").weight_split
        assert "deferred natively" in str(on)
        off = Pipeline(
            own_stages(job, rank),
            "dualpipe",
            config=DualPipeConfig(split_weight_gradients=False),
        ).weight_split
        assert off.modules == ()
        return [(module.type_name, module.split.name) for module in on.modules]

    for found in run_ranks(rank_fn, 2):
        kinds_of = dict(found)
        assert kinds_of == {"Linear": "NATIVE", "Embedding": "NONE", "LayerNorm": "NONE"}


def test_weights_wait_for_w() -> None:
    """In a schedule with I and W the gradient of a deferred layer is complete after W alone."""
    job = Job("bias", "zb1p", 2, 4)
    seen: list[tuple[int, bool]] = []

    def rank_fn(rank: int, num_ranks: int) -> list[str]:
        stages = own_stages(job, rank)
        pipeline = Pipeline(stages, "zb1p")
        inputs, labels = own_batch(job.plan(), rank, job.microbatches())

        def look(module: nn.Module, *_: object) -> None:
            linear = next(m for m in module.modules() if isinstance(m, nn.Linear))
            seen.append((rank, linear.weight.grad is None))

        if rank == 1:  # the first stage's inputs need no gradient
            stages[0].register_full_backward_hook(look)
        pipeline.step(*inputs, num_chunks=4, criterion=CASES["bias"].criterion, labels=labels)
        return [event.action for event in pipeline.last_trace]

    for rank, trace in enumerate(run_ranks(rank_fn, 2)):
        for microbatch in range(4):
            assert trace.index(f"{rank}W{microbatch}") > trace.index(f"{rank}I{microbatch}")
    assert seen[0] == (1, True)  # the first I left the weights alone
