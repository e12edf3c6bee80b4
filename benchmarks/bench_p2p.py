"""Messages of 1, 16 and 64 MiB between two ranks: their rate beside those of copies and of NCCL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import typer
from common import (
    DeviceOption,
    JsonOption,
    RepeatsOption,
    Report,
    Row,
    attempt,
    row_of,
    show_rows,
)
from message_flow import (
    Flow,
    copy_engine_seconds,
    engine_seconds,
    nccl_seconds,
    raw_seconds,
)
from places import Place, place_of

NCCL_CTAS = (0, 1, 4)


@dataclass(frozen=True)
class Reference:
    """What a transport is measured against.

    Attributes:
        name: its name in the table.
        seconds: measures it.
        goal: the share of its rate that messages must reach.
    """

    name: str
    seconds: Callable[[Flow], float]
    goal: float


# Within one GPU, a raw copy is a kernel that uses all of it; no copy engine comes near its rate.
REFERENCES = {
    "copy": Reference("a copy engine by itself", copy_engine_seconds, 0.90),
    "nccl": Reference("NCCL's own send and receive", nccl_seconds, 0.95),  # it varies by a little
}


def flows(place: Place, transport: str, num_bytes: int, repeats: int) -> dict[str, Flow]:
    """Returns what to measure at one size, by name; the goal is set for the first one."""
    found = {}
    for ctas in NCCL_CTAS if transport == "nccl" else (0,):
        name = f"nccl, {ctas or 'as many'} CTAs{'' if ctas else ' as it likes'}"
        flow = Flow(place, transport, num_bytes, repeats=repeats, max_ctas=ctas)
        found[name if transport == "nccl" else transport] = flow
    return found


def ratio(reference: float | Exception, seconds: float | Exception) -> float | Exception:
    """Returns the share of the reference's rate that was reached, or why it is not known."""
    for found in (reference, seconds):
        if isinstance(found, Exception):
            return found
    assert not isinstance(reference, Exception) and not isinstance(seconds, Exception)
    return reference / seconds


def rows_of_size(place: Place, transport: str, num_bytes: int, repeats: int) -> Iterator[Row]:
    """Measures everything over one transport at one size, row by row."""
    size = f"{num_bytes / 2**20:g} MiB"
    plain = Flow(place, "", num_bytes, repeats=repeats)
    raw = raw_seconds(plain)

    def rate(name: str, seconds: float | Exception) -> Row:
        return row_of(
            f"{size}: {name}, GB/s",
            seconds,
            lambda s: num_bytes / s * 1e-9,
            lambda s: f"{s * 1e6:.1f} us a message, {raw / s:.2f} of a raw copy's rate",
        )

    if transport == place.transports[0]:
        yield rate("raw copy", raw)
    reference = REFERENCES.get(transport)
    best: float | Exception = 0.0
    if reference:
        best = attempt(reference.seconds, plain)
        yield rate(reference.name, best)
    found = {}
    for name, flow in flows(place, transport, num_bytes, repeats).items():
        found[name] = attempt(engine_seconds, flow)
        yield rate(name, found[name])
    if reference:
        name, seconds = next(iter(found.items()))
        title = f"{size}: {name}, over {reference.name}"
        yield row_of(title, ratio(best, seconds), float, at_least=reference.goal)
        yield row_of(f"{size}: {name}, over a raw copy", ratio(raw, seconds), float)


def main(
    mib: Annotated[list[float], typer.Option(help="Sizes in MiB.")] = [1, 16, 64],  # noqa: B006
    repeats: RepeatsOption = 5,
    device: DeviceOption = "cuda",
    json: JsonOption = None,
) -> None:
    """Measure how fast messages flow by the clock of the device, apart from the hosts."""
    place = place_of(device)
    report = Report("p2p", json, place.machine())
    for transport in place.transports:
        for size in mib:
            for row in rows_of_size(place, transport, round(size * 2**20), repeats):
                report.add([row])
    show_rows("messages from rank to rank", report.rows)


if __name__ == "__main__":
    typer.run(main)
