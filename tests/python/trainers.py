"""Hugging Face's trainer on one process and over a pipeline, on the same data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hf_models import ARCHITECTURES, CLASSES, OTHERS_LIKE_THEM, TIME, VOCABULARY
from outcomes import attempt
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from dualpipe_ext.compat import DualPipeTrainer

IGNORED = -100
RECOMPUTING = next(  # what this release of transformers calls it
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(TrainingArguments, name)
)


class Texts(Dataset[dict[str, Tensor]]):
    """Tokens that follow from the ones before; the end of most rows is padding."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randint(1, 4, (rows, TIME), generator=generator)
        self.tokens = steps.cumsum(1) % (VOCABULARY - 3) + 3
        self.lengths = torch.randint(TIME // 2, TIME + 1, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        mask = (torch.arange(TIME) < self.lengths[row]).long()
        tokens = self.tokens[row] * mask
        labels = tokens.masked_fill(mask == 0, IGNORED)
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


class Stream(IterableDataset[dict[str, Tensor]]):
    """A data set of which nobody knows how long it is."""

    def __init__(self, data: Texts) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.data[row] for row in range(len(self.data)))


class Pictures(Dataset[dict[str, Tensor]]):
    """Noise around one of a few pictures."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (rows,), generator=generator)
        means = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(9))
        self.pixels = means[self.labels] + torch.randn(rows, 3, 8, 8, generator=generator) / 4

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[row], "labels": self.labels[row]}


class Ratings(Texts):
    """How long each text is: one whole number."""

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {**super().__getitem__(row), "labels": self.lengths[row]}


DATA = {"vit": Pictures, "bert classifier": Ratings}


def right_ones(prediction: Any) -> dict[str, float]:
    """How many predictions are right, and a number that depends on all logits."""
    logits, labels = prediction.predictions, prediction.label_ids
    return {
        "right": float((logits.argmax(-1) == labels)[labels != IGNORED].mean()),
        "size": float(np.abs(logits).mean()),
    }


@dataclass(frozen=True)
class Run:
    """A training run with the arguments of transformers.

    Attributes:
        model: settings of the model.
        is_streamed: whether data come from an iterable.
        options: of the trainer over a pipeline alone.
    """

    folder: str
    architecture: str = "llama"
    rows: int = 36
    model: dict[str, Any] = field(default_factory=dict)
    is_streamed: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, trainer: Callable[..., Any], **options: Any) -> Any:
        torch.manual_seed(11)
        data = DATA.get(self.architecture, Texts)
        return trainer(
            model=(ARCHITECTURES | OTHERS_LIKE_THEM)[self.architecture].make(**self.model),
            args=make_arguments(self.folder, **self.arguments),
            train_dataset=Stream(Texts(self.rows)) if self.is_streamed else data(self.rows),
            eval_dataset=data(11, seed=1),
            compute_metrics=right_ones,
            **options,
        )


@dataclass
class History:
    """What a run came to.

    Attributes:
        losses: of each batch that it trained on.
        logs: numbers by name, one of each step of the log.
        state: the model at the end.
        predictions: of the evaluation data, by the trainer.
    """

    losses: list[float]
    logs: list[dict[str, float]]
    state: dict[str, Tensor]
    predictions: Any


def make_arguments(folder: str, **arguments: Any) -> TrainingArguments:
    chosen = {
        "output_dir": folder,
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "learning_rate": 5e-3,
        "adam_epsilon": 1e-3,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # left by transformers 4 for the next run
    return TrainingArguments(**chosen)


def run(trainer: Any, resume: int = 0) -> History:
    """Trains; from the checkpoint of a step, if one is given."""
    checkpoint = f"{trainer.args.output_dir}/checkpoint-{resume}" if resume else None
    losses: list[float] = []
    _record(trainer, losses)
    trainer.train(resume_from_checkpoint=checkpoint)
    predicted = trainer.predict(trainer.eval_dataset).predictions
    state = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    return History(losses, trainer.state.log_history, state, predicted)


def _record(trainer: Any, losses: list[float]) -> None:
    step = trainer.training_step

    def recorded(*given: Any, **options: Any) -> Tensor:
        loss: Tensor = step(*given, **options)
        losses.append(float(loss))
        return loss

    trainer.training_step = recorded


def run_in_one_process(job: Run, resume: int = 0) -> History:
    return run(job.make(Trainer), resume)


def run_rank(size: int, job: Run, resume: int = 0) -> History:
    options = {"num_chunks": 2 * size, **job.options}
    return run(job.make(DualPipeTrainer, **options), resume)


def run_all(
    rank: int, size: int, jobs: dict[str, Run], resumed: Run, unsplit: Run
) -> dict[str, History]:
    """All runs in one start of the ranks, and two that go on from their checkpoints of step 2."""
    found = {name: run_rank(size, job) for name, job in jobs.items()}
    found["resumed"] = run_rank(size, resumed, resume=2)
    found["resumed from an unsplit run"] = run_rank(size, unsplit, resume=2)
    noise = {"resid_pdrop": 0.3, "embd_pdrop": 0.3}
    noisy = replace(resumed, folder=f"{resumed.folder}, noisy", model=noise)
    evaluated = {**noisy.arguments, "eval_strategy": "steps", "eval_steps": 1}
    found["noisy"] = run_rank(size, noisy)
    found["noisy, evaluated and resumed"] = run_rank(
        size, replace(noisy, arguments=evaluated), resume=2
    )
    return found


def run_with_parts(rank: int, size: int, job: Run) -> dict[str, Any]:
    """A run, and one from its checkpoint of step 2; whether all that has a state then is its own.

    Then saves that fail on the first rank, and going on although the last save was cut off.
    """
    once = run_rank(size, job)
    trainer = job.make(DualPipeTrainer, num_chunks=2 * size)
    resumed = run(trainer, resume=2)
    own = {id(p) for p in trainer.pipeline.parameters()}
    state = trainer.optimizer.optimizer.state
    found = {"once": once, "resumed": resumed, "are own": {id(p) in own for p in state}}
    (Path(job.folder) / "checkpoint-99").mkdir(exist_ok=True)  # cut off before anything was there
    going_on = job.make(DualPipeTrainer, num_chunks=2 * size)
    going_on.train(resume_from_checkpoint=True)
    found["went on to"] = going_on.state.global_step, trainer.state.global_step
    if rank == 0:
        going_on._save = _full_disk
    found["unsaved"] = attempt(going_on.save_model, f"{job.folder}/unsaved")
    found["not updated"] = attempt(fail_to_update, rank, job, size)
    going_on.args.output_dir = f"{job.folder}/elsewhere"
    found["no checkpoint"] = attempt(going_on._save_checkpoint, going_on.model, None)
    found["nothing to resume"] = attempt(going_on.train, resume_from_checkpoint=True)
    return found


def fail_to_update(rank: int, job: Run, size: int) -> None:
    """The optimizer of rank 1 raises in its second step."""
    trainer = job.make(DualPipeTrainer, num_chunks=2 * size)
    trainer.create_optimizer()
    steps = iter(range(10))

    def fail(*_: Any) -> None:
        if rank == 1 and next(steps) == 1:
            raise RuntimeError("out of luck")

    getattr(trainer.optimizer, "optimizer", trainer.optimizer).register_step_pre_hook(fail)
    trainer.train()


def _full_disk(*_: Any, **__: Any) -> None:
    raise OSError("No space left on device")


def is_exact(name: str) -> bool:
    """Whether a number of the log has nothing to do with time, and all of its digits.

    Losses of training are rounded by transformers 4; that of a resumed run as a whole counts the
    steps before as well.
    """
    return name.endswith(("eval_loss", "norm", "rate", "right", "size", "epoch", "step"))


def check(found: History, expected: History, relative: float) -> None:
    """The losses of a run or of its end, the numbers of each log, the model, its predictions."""
    wanted = expected.losses[-len(found.losses) :]
    close = torch.testing.assert_close
    close(torch.tensor(found.losses), torch.tensor(wanted), rtol=relative, atol=0.0)
    for log, same in zip(found.logs, expected.logs, strict=True):
        for name, value in same.items():
            if is_exact(name):
                assert math.isclose(log[name], value, rel_tol=relative, abs_tol=1e-12), (name, log)
    close(found.state, expected.state, rtol=10 * relative, atol=relative)
    close(
        torch.as_tensor(found.predictions),
        torch.as_tensor(expected.predictions),
        rtol=10 * relative,
        atol=relative,
    )
