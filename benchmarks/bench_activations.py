"""Live activations and peak memory in a step, beside what the schedule predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from common import (
    DeviceOption,
    JsonOption,
    Report,
    Row,
    attempt,
    on_ranks,
    row_of,
    show_rows,
)
from places import Place, engine_config, place_of
from sleeping import free_loss
from torch import Tensor, nn

from dualpipe_ext import DualPipe

MIB = 1 << 20
STAGE_S = 0.002
LOOKAHEAD = 2


class _Hold(torch.autograd.Function):
    """Occupies memory from its forward to its backward, as activations do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stage: HoldingStage) -> Tensor:
        ctx.held = stage.place.hold(stage.num_bytes)
        ctx.place = stage.place
        stage.place.sleep(STAGE_S)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.place.sleep(2 * STAGE_S)
        return torch.empty_like(grads[0]), None, None


class HoldingStage(nn.Module):
    """A stage with activations of ``num_bytes``."""

    def __init__(self, place: Place, num_bytes: int) -> None:
        super().__init__()
        self.place = place
        self.num_bytes = num_bytes
        self.weight = nn.Parameter(torch.zeros(1, device=place.device))

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor like ``x``."""
        return _Hold.apply(x, self.weight, self)  # type: ignore[no-any-return,no-untyped-call]


@dataclass(frozen=True)
class Sizes:
    """Bytes of one micro-batch: what a stage keeps of it, and the size of its message."""

    activation: int
    message: int


@dataclass(frozen=True)
class Peak:
    """The peaks of a step, on the worst rank.

    Attributes:
        live: the most live activations, in micro-batches, on the rank with the most.
        planned: what the schedule plans for it.
        measured: peak bytes on the rank that is farthest from its prediction.
        predicted: the prediction for that rank.
    """

    live: int
    planned: int
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """The relative difference between the measured peak and the predicted one."""
        return abs(self.measured / self.predicted - 1)


def predicted_bytes(num_ranks: int, sizes: Sizes, batch: int) -> int:
    """Returns the predicted peak of a rank.

    It is made up of P+1 live micro-batches, each with its activation and its received input; the
    receives of each kind that are posted ahead, and one in use; an output and a gradient being
    sent; and the batch.
    """
    live = (num_ranks + 1) * (sizes.activation + sizes.message)
    messages = (2 * (LOOKAHEAD + 1) + 2) * sizes.message
    return live + messages + batch


def measure(
    rank: int, num_ranks: int, place: Place, transport: str, chunks: int, sizes: Sizes
) -> Peak:
    """Runs steps on a rank that is a process; returns the worst peaks of all ranks."""
    config = engine_config(transport, lookahead=LOOKAHEAD)
    model = DualPipe([HoldingStage(place, sizes.activation) for _ in "01"], config=config)
    is_end = rank in (0, num_ranks - 1)
    row = torch.zeros(1, sizes.message // 4, device=place.device)
    data = row.expand(chunks // 2, -1) if is_end else None
    for _ in range(3):
        place.finish()
        place.reset_peak()
        model.step(data, num_chunks=chunks, criterion=free_loss, labels=(data,))
        place.finish()
    stats = model.stats()
    found = [
        float(stats.peak_live_activations),
        float(stats.planned_peak_activations),
        float(place.peak_bytes()),
        float(predicted_bytes(num_ranks, sizes, row.nbytes)),
    ]
    return worst([Peak(round(a), round(b), c, d) for a, b, c, d in gathered(model, found)])


def gathered(model: DualPipe, numbers: list[float]) -> list[list[float]]:
    """Returns the numbers of all ranks."""
    return model.group.all_gather_floats(numbers, model.config.timeout)


def worst(peaks: list[Peak]) -> Peak:
    """Returns the most live activations, beside the peak that is farthest from its prediction."""
    far = max(peaks, key=lambda peak: peak.error)
    most = max(peaks, key=lambda peak: peak.live)
    return Peak(most.live, most.planned, far.measured, far.predicted)


def rows_of_transport(
    place: Place, transport: str, num_ranks: int, chunks: int, sizes: Sizes
) -> list[Row]:
    """Measures over one transport."""
    found = attempt(lambda: on_ranks(measure, num_ranks, place, transport, chunks, sizes))
    title = f"P={num_ranks}, processes, {transport}"
    return [
        row_of(
            f"{title}: live activations",
            found,
            lambda peak: float(peak.live),
            lambda peak: f"planned {peak.planned}",
            at_least=num_ranks + 1,
            at_most=num_ranks + 1,
        ),
        row_of(
            f"{title}: peak bytes, distance from the prediction",
            found,
            lambda peak: peak.error,
            lambda peak: f"{peak.measured / MIB:.1f} MiB, predicted {peak.predicted / MIB:.1f} MiB",
            at_most=0.02,
        ),
    ]


def main(
    ranks: Annotated[int, typer.Option(help="Number of ranks.")] = 4,
    chunks: Annotated[int, typer.Option(help="Micro-batches.")] = 20,
    activation_mib: Annotated[int, typer.Option(help="Activations of a micro-batch.")] = 256,
    message_kib: Annotated[int, typer.Option(help="Size of a message.")] = 1024,
    device: DeviceOption = "cuda",
    json: JsonOption = None,
) -> None:
    """Measure how much memory a step of known activations takes."""
    place = place_of(device)
    sizes = Sizes(activation_mib * MIB, message_kib * 1024)
    report = Report("activations", json, place.machine())
    for transport in place.transports:
        report.add(rows_of_transport(place, transport, ranks, chunks, sizes))
    title = f"activations of {activation_mib} MiB, messages of {message_kib} KiB"
    show_rows(title, report.rows)


if __name__ == "__main__":
    typer.run(main)
