"""Messages of 1, 16 and 64 MiB between two ranks: their rate beside a raw copy's and NCCL's own."""

from __future__ import annotations

from collections.abc import Iterator
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
from message_flow import Flow, engine_seconds, nccl_seconds, raw_seconds
from places import Place, place_of

GOALS = {"copy": 0.90, "nccl": 0.95}  # of a raw copy; of NCCL's own rate, which varies by a little
NCCL_CTAS = (0, 1, 4)


def flows(place: Place, num_bytes: int, repeats: int) -> dict[str, tuple[Flow, bool]]:
    """Return what is measured at one size by name, and whether it is what the goal is set for."""
    found: dict[str, tuple[Flow, bool]] = {}
    for transport in place.transports:
        if transport != "nccl":
            found[transport] = Flow(place, transport, num_bytes, repeats=repeats), True
            continue
        for ctas in NCCL_CTAS:
            name = f"nccl, {ctas} CTAs" if ctas else "nccl, CTAs as it likes"
            found[name] = (
                Flow(place, transport, num_bytes, repeats=repeats, max_ctas=ctas),
                not ctas,
            )
    return found


def ratio(reference: float | Exception, seconds: float | Exception) -> float | Exception:
    """Return how much of the reference's rate was reached, or why that is not known."""
    for found in (reference, seconds):
        if isinstance(found, Exception):
            return found
    assert not isinstance(reference, Exception) and not isinstance(seconds, Exception)
    return reference / seconds


def rows_of_size(place: Place, num_bytes: int, repeats: int) -> Iterator[Row]:
    """Measure everything at one size, row by row."""
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

    yield rate("raw copy", raw)
    reference: dict[str, tuple[str, float | Exception]] = {"copy": ("a raw copy", raw)}
    if "nccl" in place.transports:
        reference["nccl"] = "NCCL's own", attempt(nccl_seconds, plain)
        yield rate("NCCL's own send and receive", reference["nccl"][1])
    for name, (flow, has_goal) in flows(place, num_bytes, repeats).items():
        seconds = attempt(engine_seconds, flow)
        yield rate(name, seconds)
        if has_goal and flow.transport in GOALS:
            what, best = reference[flow.transport]
            found = ratio(best, seconds)
            limit = GOALS[flow.transport]
            yield row_of(f"{size}: {name}, over {what}", found, float, at_least=limit)


def main(
    mib: Annotated[list[float], typer.Option(help="Sizes in MiB.")] = [1, 16, 64],  # noqa: B006
    repeats: RepeatsOption = 5,
    device: DeviceOption = "cuda",
    json: JsonOption = None,
) -> None:
    """Measure how fast messages flow in the time of the device, hosts aside."""
    place = place_of(device)
    report = Report("p2p", json, place.machine())
    for size in mib:
        for row in rows_of_size(place, round(size * 2**20), repeats):
            report.add([row])
    show_rows("messages from rank to rank", report.rows)


if __name__ == "__main__":
    typer.run(main)
