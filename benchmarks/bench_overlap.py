"""What messages that take 0.5 ms add to a step with stages of 2 ms, compared with tiny messages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import typer
from common import (
    DeviceOption,
    JsonOption,
    RepeatsOption,
    Report,
    Result,
    Row,
    attempt,
    row_of,
    show_rows,
)
from contenders import Work, timed_ours
from message_flow import Flow, engine_seconds
from places import Place, place_of
from sleeping import SleepTimes
from thread_ranks import in_threads, seconds_of_turns, why_not_in_threads

GOAL = 0.03
TINY_BYTES = 4096


def message_bytes(bytes_per_second: float, seconds: float, most: float) -> int:
    """Returns the size of a message that takes ``seconds``, at most ``most``, in whole KiB."""
    return max(1, round(min(bytes_per_second * seconds, most) / 1024)) * 1024


def room_for_message(place: Place, num_ranks: int) -> float:
    """Returns the largest size of messages at which all that are live at once fit on the device.

    A rank holds P+1 activations, three receives of each kind ahead, its stages' own buffers and its
    part of the batch.
    """
    return 0.75 * place.free_bytes() / (num_ranks * (num_ranks + 12))


@dataclass(frozen=True)
class Sizes:
    """Steps that differ only in the sizes of their messages.

    Attributes:
        large: messages that take a quarter of a stage's time, or as large as fit on the device.
        tiny: messages of 4 KiB.
        message_s: the seconds that a large message takes by itself.
    """

    large: Work
    tiny: Work
    message_s: float

    def facts(self, num_ranks: int) -> dict[str, float]:
        """Returns what the table says about the large messages.

        A message occupies its channel for so long that a step is longer even if nothing else is in
        the way. Moreover, all channels of one GPU may share one copy engine, which then has to
        carry all messages of a step.
        """
        free = self.large.makespan("dualpipe", num_ranks, "early")
        slow = self.large.makespan("dualpipe", num_ranks, "early", message_time=self.message_s)
        num_messages = 2 * self.large.num_chunks * (num_ranks - 1)
        return {
            "MiB": self.large.message_bytes / 2**20,
            "ms": self.message_s * 1e3,
            "simulated": (slow - free) / slow,
            "all of a step": num_messages * self.message_s / slow,
        }


def sizes_of(place: Place, transport: str, num_ranks: int, chunks: int, stage_ms: float) -> Sizes:
    """Measures the rate of messages, and chooses sizes by it."""
    probe = Flow(place, transport, 64 << 20 if place.device.type == "cuda" else 1 << 20, repeats=3)
    rate = probe.num_bytes / engine_seconds(probe)
    size = message_bytes(rate, stage_ms / 4 * 1e-3, room_for_message(place, num_ranks))
    times = SleepTimes(*[stage_ms * 1e-3] * 3)
    large = Work(chunks, size, times, place=place, transport=transport, light=True)
    return Sizes(large, dataclasses.replace(large, message_bytes=TINY_BYTES), size / rate)


def visible(results: list[Result]) -> float:
    """Returns what share of a step with large messages it takes longer than one with tiny ones."""
    large, tiny = results
    return (large.median - tiny.median) / large.median


def describe(results: list[Result]) -> str:
    """Returns what the share was computed from."""
    large, tiny = results
    facts = large.facts
    return (
        f"{large.median * 1e3:.2f} and {tiny.median * 1e3:.2f} ms; messages of {facts['MiB']:.1f} "
        f"MiB take {facts['ms']:.2f} ms; simulated {facts['simulated']:.3f}, where each channel is for "
        f"itself; all messages one by one take {facts['all of a step']:.2f} of the step"
    )


def measure_threads(sizes: Sizes, num_ranks: int, repeats: int) -> list[Result]:
    """Times our steps with both sizes, on ranks that are threads."""
    works = [sizes.large, sizes.tiny]
    spans = in_threads(timed_ours, num_ranks, works, repeats)
    facts = sizes.facts(num_ranks)
    return [
        Result(work.transport, seconds_of_turns(spans, i), facts) for i, work in enumerate(works)
    ]


def measure_transport(
    report: Report,
    place: Place,
    transport: str,
    num_ranks: int,
    chunks: int,
    stage_ms: float,
    repeats: int,
) -> None:
    """Measures our steps on threads over one transport, and adds them to the report."""
    title = f"P={num_ranks}, {transport}"
    name = f"{title}: visible share"
    if problem := why_not_in_threads(transport, num_ranks):
        report.add([Row(name, None, note=problem)])
        return

    def measure() -> list[Result]:
        sizes = sizes_of(place, transport, num_ranks, chunks, stage_ms)
        return measure_threads(sizes, num_ranks, repeats)

    found = attempt(measure)
    row = row_of(name, found, visible, describe, at_most=GOAL)
    report.add([row], {} if isinstance(found, Exception) else {title: found})


def main(
    ranks: Annotated[list[int], typer.Option(help="Numbers of ranks.")] = [2, 4],  # noqa: B006
    chunks: Annotated[int, typer.Option(help="Micro-batches.")] = 20,
    stage_ms: Annotated[float, typer.Option(help="Length of each of F, I and W.")] = 2.0,
    repeats: RepeatsOption = 7,
    device: DeviceOption = "cuda",
    json: JsonOption = None,
) -> None:
    """Measure the share of a step that messages worth a quarter of a stage add to it."""
    place = place_of(device)
    report = Report("overlap", json, place.machine())
    for transport in place.transports:
        for num_ranks in ranks:
            measure_transport(report, place, transport, num_ranks, chunks, stage_ms, repeats)
    title = f"stages of {stage_ms:g} ms, messages worth {stage_ms / 4:g} ms, N={chunks}"
    show_rows(title, report.rows)


if __name__ == "__main__":
    typer.run(main)
