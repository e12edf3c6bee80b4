"""What every transport must do, from Python: the counterpart of tests/cpp/comm/conformance.cpp.

Each check runs on two ranks at once; ``CHECKS`` names them all.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dualpipe_ext import _C

Tensor = tuple[int, bool, list[int], bytes]
Tensors = list["Tensor | None"]


@dataclass
class Ends:
    """One rank's ends of a pipeline of two ranks."""

    rank: int
    transport: _C.Transport
    control: _C.ControlPlane
    wait_for_peer: Callable[[], object]

    @property
    def peer(self) -> int:
        """The other rank."""
        return 1 - self.rank

    @contextmanager
    def step(self, number: int = 1) -> Iterator[None]:
        """A step that ends well."""
        self.transport.begin_step(number, 0xABCD, "a check")
        yield
        self.transport.end_step()

    def send(self, microbatch: int, tensors: Tensors, kind: str = "ACTIVATION") -> None:
        """Sends to the other rank."""
        kinds = _C.MessageKind.__members__
        self.transport.send(self.peer, kinds[kind], 1, microbatch, tensors)

    def receive(self, microbatch: int, kind: str = "ACTIVATION") -> _C.PendingReceive:
        """Asks for a message of the other rank."""
        kinds = _C.MessageKind.__members__
        return self.transport.receive(self.peer, kinds[kind], 1, microbatch)

    def transfer(self, messages: list[Tensors], step: int = 1) -> None:
        """Moves messages from rank 0 to rank 1 and compares them there."""
        with self.step(step):
            for number, tensors in enumerate(messages):
                if self.rank == 0:
                    self.send(number, tensors)
                else:
                    assert self.receive(number).wait() == tensors, f"message {number}"


def tensor(num_bytes: int, seed: int = 0, dtype: int = 0, requires_grad: bool = False) -> Tensor:
    """A one-dimensional tensor of bytes with a pattern."""
    pattern = bytes((seed + 7 * i) % 251 for i in range(251))
    content = (pattern * (num_bytes // 251 + 1))[:num_bytes]
    return (dtype, requires_grad, [num_bytes], content)


def check_order(ends: Ends) -> None:
    """Fifty messages arrive as they were sent."""
    ends.transfer([[tensor(40, seed)] for seed in range(50)])


def check_kinds(ends: Ends) -> None:
    """The kinds of messages are channels of their own."""
    kinds = list(_C.MessageKind.__members__)
    with ends.step():
        if ends.rank == 0:
            for seed, kind in enumerate(kinds):
                ends.send(7, [tensor(8, seed)], kind)
        else:
            for seed, kind in reversed(list(enumerate(kinds))):
                assert ends.receive(7, kind).wait() == [tensor(8, seed)]


def check_both_ways(ends: Ends) -> None:
    """Receives are posted ahead of sends, on both ranks."""
    with ends.step():
        receives = [ends.receive(i, "GRADIENT") for i in range(3)]
        for i in range(3):
            ends.send(i, [tensor(100, 10 * ends.rank + i)], "GRADIENT")
        for i, receive in enumerate(receives):
            assert receive.wait() == [tensor(100, 10 * ends.peer + i)]


def check_none_and_empty(ends: Ends) -> None:
    """None, no tensors, tensors without elements and scalars."""
    scalar: Tensor = (6, True, [], b"\x00\x01\x02\x03")
    ends.transfer([[], [None], [None, None], [tensor(0)], [None, tensor(5), None], [scalar]])


def check_dtypes(ends: Ends) -> None:
    """Every dtype code, shapes up to eight dimensions, requires_grad."""
    many = [tensor(16, dtype, dtype, bool(dtype % 2)) for dtype in range(45)]
    deep: Tensor = (0, False, [1, 2, 1, 1, 2, 1, 1, 4], bytes(range(16)))
    ends.transfer([[*many, deep]])


def check_changing_layouts(ends: Ends) -> None:
    """Layouts that change from step to step and within a step."""
    for step in range(8):
        size = 64 if step < 3 else 20_000 * (9 - step)
        ends.transfer(
            [[tensor(size)], [tensor(64), tensor(30_000 if step % 2 else 10)], [tensor(9)] * step],
            step,
        )


def check_large(ends: Ends) -> None:
    """Eight mebibytes, twice a step."""
    large: Tensors = [tensor(8 << 20, 3), tensor(3)]
    for step in range(3):
        ends.transfer([large, large], step)


def check_many_tensors(ends: Ends) -> None:
    """More tensors than a first message has room for."""
    for step in range(3):
        ends.transfer([[tensor(11, seed) for seed in range(300)]], step)


def check_step_mismatch(ends: Ends) -> None:
    """Ranks in different programs both say so; afterwards they agree again."""
    description = ["8 micro-batches", "10 micro-batches"][ends.rank]
    with pytest.raises(ValueError) as caught:
        ends.transport.begin_step(3, 100 + ends.rank, description)
        receive = ends.receive(0)
        ends.send(0, [tensor(8)])
        receive.wait()
        ends.transport.end_step()
    assert 'rank 0 runs "8 micro-batches" (run 3' in str(caught.value)
    assert 'rank 1 runs "10 micro-batches" (run 3' in str(caught.value)
    ends.transport.recover()
    ends.transfer([[tensor(8)]], 4)


def check_abort(ends: Ends) -> None:
    """Abort wakes a blocked wait, and every later call throws until recover()."""
    transport = ends.transport
    transport.begin_step(1, 1, "a check")
    receive = ends.receive(0)
    aborter = threading.Timer(0.05, transport.abort, (0, 1, "rank 0 gave up"))
    aborter.start()
    calls: list[Callable[[], object]] = [
        receive.wait,
        lambda: ends.receive(1),
        lambda: ends.send(0, [tensor(8)]),
        transport.end_step,
        lambda: transport.begin_step(2, 1, "a check"),
    ]
    for call in calls:
        with pytest.raises(_C.PipelineError, match=r"^rank 0 gave up$"):
            call()
    aborter.join()
    ends.wait_for_peer()
    transport.recover()
    ends.transfer([[tensor(8)]])


def check_abort_in_commit(ends: Ends) -> None:
    """Abort wakes a rank that waits for the others to end the step."""
    ends.transport.begin_step(1, 1, "a check")
    if ends.rank == 1:
        aborter = threading.Timer(0.05, ends.transport.abort, (0, 1, "rank 0 gave up"))
        aborter.start()
        with pytest.raises(_C.PipelineError, match=r"^rank 0 gave up$"):
            ends.transport.end_step()
        aborter.join()
    ends.wait_for_peer()
    ends.transport.recover()
    ends.transfer([[tensor(8)]])


def check_recover(ends: Ends) -> None:
    """What was in flight in a failed step, in either direction, reaches nobody later."""
    for attempt in range(5):
        ends.transport.begin_step(attempt, 1, "a check")
        if ends.rank == 0:
            ends.send(0, [tensor(24, 99)])
            ends.send(1, [tensor(300_000, 98)])
            ends.receive(0, "GRADIENT")
        else:
            ends.receive(0).wait()
            ends.receive(0, "MIRROR_LOW")
        ends.wait_for_peer()
        ends.transport.abort(0, attempt, "a fault")
        ends.transport.recover()
        ends.transfer([[tensor(16, 1)], [tensor(300_000, 2)], [tensor(16, 3)]])


def check_lost_message(ends: Ends) -> None:
    """A message out of order is named with the channel, and what was expected instead."""
    ends.transport.begin_step(1, 1, "a check")
    if ends.rank == 0:
        ends.send(5, [tensor(8)])
        ends.wait_for_peer()
    else:
        with pytest.raises(_C.PipelineError) as caught:
            ends.receive(4).wait()
        assert "rank 0 -> rank 1" in str(caught.value)
        assert "expected the activation of micro-batch 4 for stage 1" in str(caught.value)
        assert "got the activation of micro-batch 5" in str(caught.value)
        ends.wait_for_peer()
    ends.transport.recover()
    ends.transfer([[tensor(8)]])


def check_failures_travel(ends: Ends) -> None:
    """The first report of an epoch is everybody's; positions are seen by all."""
    control = ends.control
    control.publish_position(f"rank {ends.rank} is here")
    if ends.rank == 1:
        control.report(1, 12, "rank 1, action 2F3: no\nmore")
        control.report(1, 12, "a second one")
    ends.wait_for_peer()
    assert control.positions() == ["rank 0 is here", "rank 1 is here"]
    assert control.poll() == (1, 12, "rank 1, action 2F3: no\nmore")
    control.advance_epoch()
    assert control.poll() is None
    assert control.positions() == ["", ""]


def check_flat_memory(ends: Ends) -> None:
    """Two thousand messages of 64 KiB, both ways, leave nothing behind."""
    payload: Tensors = [tensor(65_536)]
    resident: list[int] = []
    for step in range(100):
        with ends.step(step):
            receives = [ends.receive(i) for i in range(10)]
            for i in range(10):
                ends.send(i, payload)
            for receive in receives:
                assert receive.wait() == payload
        resident.append(resident_bytes())
    assert resident[-1] - resident[19] < 4 << 20


def resident_bytes() -> int:
    """What this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


CHECKS: dict[str, Callable[[Ends], None]] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}


def outcome_of(check: Callable[[Ends], None], ends: Ends) -> str:
    """Runs a check on this rank: its traceback, or nothing. A rank that fails stops the other."""
    stop = threading.Event()
    watcher = threading.Thread(target=_stop_with_the_other, args=(ends, stop))
    watcher.start()
    try:
        check(ends)
        return ""
    except BaseException:  # noqa: BLE001 - also what pytest raises
        ends.control.report(ends.rank, 0, STOPPED)
        return traceback.format_exc()
    finally:
        stop.set()
        watcher.join()


STOPPED = "the other rank failed this check"


def _stop_with_the_other(ends: Ends, stop: threading.Event) -> None:
    while not stop.wait(0.05):
        failure = ends.control.poll()
        if failure is not None and failure[2] == STOPPED and failure[0] != ends.rank:
            ends.transport.abort(*failure)
            time.sleep(0.05)
