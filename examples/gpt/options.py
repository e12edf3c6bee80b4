"""What a training run is made of, checked before anything starts."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from dualpipe_ext.schedule import Schedule, plan
from gpt.model import GPTConfig


@dataclass(frozen=True)
class Options:
    """A training run.

    Attributes:
        model: The shape of the GPT.
        schedule: Name of the pipeline schedule.
        ranks: Number of pipeline ranks.
        steps: Optimizer steps of the whole run; the learning rate follows it.
        stop_after: Steps after which this session of the run ends; 0: with the run.
        microbatches: Micro-batches of a step.
        rows: Sequences of a micro-batch.
        learning_rate: Its peak.
        warmup: Steps until the peak.
        weight_decay: For matrices; vectors are not decayed.
        clip: Largest norm of a gradient.
        seed: Of weights and batches.
        evaluate_every: Steps between two looks at the held-out text.
        save_every: Steps between two checkpoints.
        checkpoint: File that holds the run.
        resume: Go on from it.
        data: Folder of text files; the Python standard library by default.
        losses: File that gets a line of JSON a step, if any.
        sample_bytes: Length of the text to write at the end.
    """

    model: GPTConfig = field(default_factory=GPTConfig)
    schedule: str = "dualpipe"
    ranks: int = 4
    steps: int = 200
    stop_after: int = 0
    microbatches: int = 8
    rows: int = 8
    learning_rate: float = 4e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    evaluate_every: int = 25
    save_every: int = 100
    checkpoint: Path = Path("checkpoints/gpt.pt")
    resume: bool = False
    data: Path | None = None
    losses: Path | None = None
    sample_bytes: int = 240

    def plan(self) -> Schedule:
        """Return the schedule of a step."""
        return plan(self.schedule, num_ranks=self.ranks, num_microbatches=self.microbatches)

    @property
    def batch_rows(self) -> int:
        """Sequences of a whole step."""
        return self.microbatches * self.rows

    @property
    def batch_tokens(self) -> int:
        """Tokens of a whole step."""
        return self.batch_rows * self.model.context

    def check(self) -> None:
        """Raise a ``ValueError`` that says what to change if the run is not possible."""
        stages, model = self.plan().num_stages, self.model
        if model.width % model.heads:
            raise ValueError(
                f"--width {model.width} is not a multiple of --heads {model.heads}: choose a "
                f"width such as {model.width // model.heads * model.heads + model.heads}"
            )
        if model.layers < stages:
            raise ValueError(
                f"--layers {model.layers} is too few for the {stages} stages of {self.schedule} "
                f"on {self.ranks} ranks: give --layers {stages} or more, or fewer --ranks"
            )


def world() -> tuple[int, int] | None:
    """Return (rank, number of ranks) if a launcher such as torchrun started this process."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def join_world() -> None:
    """Join the process group that the launcher's environment describes."""
    dist.init_process_group("gloo")
