"""Lightning's trainer on one process and over a pipeline, on the same data."""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from outcomes import Outcome, attempt
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dualpipe_ext.compat import DualPipeLightningModule, DualPipeStrategy
from dualpipe_ext.training.losses import BatchLoss, Reduction

WARNINGS = (  # Lightning's own
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The dirpath has changed",
)


class Block(nn.Module):
    """One of many."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.dropout(torch.tanh(self.linear(x)))
        return y


class Perceptron(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def make_loader(rows: int, seed: int, shuffle: bool, is_padded: bool = False) -> Any:
    """Where it is padded, half of the rows do not count, all of some micro-batches among them."""
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    if is_padded:
        y[1::2] = -100
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle)


def make_optimizer(parameters: Any) -> dict[str, Any]:
    """Biases do not decay."""
    given = list(parameters)
    groups = [
        {"params": [p for p in given if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in given if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Unsplit(LightningModule):  # type: ignore[misc]
    """What anybody writes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Perceptron()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(batch[0])

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.parameters())


class Split(DualPipeLightningModule):
    """The same over a pipeline."""

    def __init__(
        self, num_chunks: int, dropout: float = 0.0, reduction: Reduction | None = None
    ) -> None:
        super().__init__(model=Perceptron(dropout), num_chunks=num_chunks, reduction=reduction)

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.dualpipe_wrapper.local_module.parameters())

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)


class Noisy(Split):
    """Learns nothing, with dropout."""

    def __init__(self, num_chunks: int) -> None:
        super().__init__(num_chunks, dropout=0.5)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.dualpipe_wrapper.local_module.parameters(), lr=0.0)


class Own(Split):
    """Has a step of its own, beside the pipeline."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.model(batch[0]), batch[1])


class Scaled(Split):
    """Changes the loss after it was trained."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0.5


class Warm(Split):
    """Has a parameter of its criterion's."""

    def __init__(self, num_chunks: int) -> None:
        super().__init__(num_chunks)
        self.temperature = nn.Parameter(torch.ones(()))


class SecondOrder(Split):
    """Has an optimizer that looks at all parameters several times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.dualpipe_wrapper.local_module.parameters())


class Measured(Split):
    """Calls its model in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("right", (self(batch[0]).argmax(-1) == batch[1]).float().mean())
        return super().validation_step(batch, batch_idx)


class Manual(Split):
    """Steps its optimizer by itself."""

    def __init__(self, num_chunks: int) -> None:
        super().__init__(num_chunks)
        self.automatic_optimization = False


class Losses(Callback):  # type: ignore[misc]
    """Remembers what was logged with each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        folder: of its checkpoints; none are written where it is empty.
        options: of the trainer.
        resume: the checkpoint to go on from.
        is_padded: some of its targets are -100, and the loss is the mean over the others.
    """

    folder: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None
    is_padded: bool = False


@dataclass
class History:
    """What came of a run; ``state`` is that of the end, before anything was read again.

    ``logs`` has what a logger wrote into its file on the first rank, by column.
    """

    losses: list[float]
    logs: dict[str, list[float]]
    scores: list[float]
    state: dict[str, Tensor]
    predictions: Tensor


def make_trainer(job: Run, callbacks: list[Any], **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=callbacks,
        logger=CSVLogger(job.folder, "log", 0) if job.folder else False,
        log_every_n_steps=1,
        enable_checkpointing=bool(job.folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        **job.options,
        **options,
    )


def run(job: Run, module: Any, **options: Any) -> History:
    """Trains, validates at the end and with the best checkpoint, predicts."""
    seed_everything(1, verbose=False)
    torch.rand(3)  # as a script that makes its model behind the seed
    losses = Losses()
    saver = ModelCheckpoint(job.folder, "{epoch}", save_top_k=-1, monitor="val_loss")
    watchers = [saver, LearningRateMonitor(), EarlyStopping("val_loss", patience=9)]
    trainer = make_trainer(job, [losses, *watchers] if job.folder else [losses], **options)
    train = make_loader(45, 0, True, job.is_padded)
    held_out = make_loader(19, 1, False, job.is_padded)
    trainer.fit(module, train, held_out, ckpt_path=job.resume)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    logs = read_logs(job) if trainer.is_global_zero else {}
    (last,) = trainer.validate(module, held_out, verbose=False)
    scores = [last["val_loss"]]
    if job.folder:
        best = trainer.validate(module, held_out, ckpt_path=saver.best_model_path, verbose=False)
        scores += [best[0]["val_loss"], float(saver.best_model_score)]
    return History(losses.losses, logs, scores, state, torch.cat(trainer.predict(module, held_out)))


def read_logs(job: Run) -> dict[str, list[float]]:
    path = Path(job.folder, "log", "version_0", "metrics.csv")
    if not path.is_file():
        return {}
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def run_in_one_process(job: Run) -> History:
    seed_everything(0, verbose=False)
    return run(job, Unsplit(), devices=1)


def start_as_torchrun(rank: int, size: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "test",
    }


def measure(size: int) -> Outcome:
    """What comes of a validation that calls the whole model."""
    trainer = make_trainer(Run(), [], devices=size, strategy=DualPipeStrategy())
    data = make_loader(16, 0, False)
    module = Measured(2 * size)
    outcome = attempt(trainer.fit, module, data, data)
    copy.deepcopy(module.model)(torch.ones(1, 8))  # and afterwards it is a model as any other
    return outcome


def run_over_pipeline(size: int, job: Run, num_stages: int = 0) -> History:
    """With fewer stages than ranks, over replicas."""
    seed_everything(0, verbose=False)
    module = Split(2 * (num_stages or size), reduction="token" if job.is_padded else None)
    return run(job, module, devices=size, strategy=DualPipeStrategy(num_stages=num_stages))


def check(found: History, expected: History, relative: float) -> None:
    """The losses of a run, the scores, the model, its predictions."""
    close = torch.testing.assert_close
    for one, other in [(found.losses, expected.losses), (found.scores, expected.scores)]:
        close(torch.tensor(one), torch.tensor(other), rtol=relative, atol=0.0)
    close(found.state, expected.state, rtol=10 * relative, atol=relative)
    close(found.predictions, expected.predictions, rtol=10 * relative, atol=relative)


def run_all(rank: int, size: int, jobs: dict[str, Run]) -> dict[str, Any]:
    """All runs on one rank; then what is refused."""
    start_as_torchrun(rank, size)
    found: dict[str, Any] = {name: run_over_pipeline(size, job) for name, job in jobs.items()}
    folder = str(Path(next(job.folder for job in jobs.values() if job.folder)).parent / "noisy")
    found["noisy"] = [noisy_losses(size), noisy_losses(size, folder)]
    found["noisy, resumed"] = noisy_losses(size, resume=f"{folder}/epoch=0.ckpt")
    found["numbers drawn"] = numbers_around_steps(size)
    return {**found, **{name: refused(name, size) for name in REFUSED}}


def run_with_parts(rank: int, size: int, jobs: dict[str, Run]) -> dict[str, Any]:
    """Runs where a rank has a part of the stages; then a validation that needs all of them."""
    start_as_torchrun(rank, size)
    found: dict[str, Any] = {name: run_over_pipeline(size, job) for name, job in jobs.items()}
    return {
        **found,
        "measured": measure(size),
        "unsaved": save_to_a_full_disk(rank, size),
        "not updated": attempt(fail_to_update, rank, size),
    }


class Unlucky(Split):
    """The optimizer of rank 1 raises."""

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        if self.dualpipe_wrapper.pipeline.rank == 1:
            found["optimizer"].register_step_pre_hook(out_of_luck)
        return found


def out_of_luck(*_: Any) -> None:
    raise RuntimeError("out of luck")


def fail_to_update(rank: int, size: int) -> None:
    """It has no part in the norm by which the others would clip."""
    options = {"devices": size, "strategy": DualPipeStrategy(), "gradient_clip_val": 0.5}
    trainer = make_trainer(Run(), [], **options)
    trainer.fit(Unlucky(2 * size), make_loader(8, 0, False))


def save_to_a_full_disk(rank: int, size: int) -> Outcome:
    """The first rank cannot write."""
    trainer = make_trainer(Run(), [], devices=size, strategy=DualPipeStrategy())
    trainer.fit(Split(2 * size), make_loader(8, 0, False))
    if rank == 0:
        trainer.strategy.checkpoint_io.save_checkpoint = full_disk
    return attempt(trainer.save_checkpoint, "unsaved.ckpt")


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError("No space left on device")


def noisy_losses(size: int, folder: str = "", resume: str | None = None) -> list[float]:
    """With dropout and the same batch three times; saved after each of them."""
    seed_everything(0, verbose=False)
    losses = Losses()
    saver = [ModelCheckpoint(folder, "{epoch}", save_top_k=-1)] if folder else []
    trainer = make_trainer(Run(folder), [losses, *saver], devices=size, strategy=DualPipeStrategy())
    trainer.fit(Noisy(2 * size), make_loader(8, 0, False), ckpt_path=resume)
    return losses.losses


def numbers_around_steps(size: int) -> list[float]:
    """What the generator gives after the same seed: alone, after a step, and after an inference."""
    module = Noisy(2 * size)
    trainer = make_trainer(Run(), [], devices=size, strategy=DualPipeStrategy())
    trainer.fit(module, make_loader(8, 0, False))
    built, batch = module.dualpipe_wrapper, next(iter(make_loader(8, 0, False)))
    loss = BatchLoss(F.cross_entropy, "mean")
    between = [lambda: None, lambda: built.step(batch, loss), lambda: built.infer(batch)]
    return [number_after(act) for act in between]


def number_after(act: Callable[[], Any]) -> float:
    torch.manual_seed(3)
    act()
    return float(torch.rand(()))


REFUSED: dict[str, dict[str, Any]] = {
    "precision='16-true'": {"precision": "16-true"},
    "sync_batchnorm=True": {"sync_batchnorm": True},
    "WeightAveraging": {},
    "automatic_optimization=False": {},
    "training_step": {},
    "all of the loss into criterion": {},
    "parameters outside of its model: temperature": {},
    "LBFGS": {},
    "DualPipeLightningModule; found Unsplit": {},
    "num_microbatches": {},
    "choose reduction='token'": {},
}


def refused(name: str, size: int) -> Outcome:
    """What comes of a training that cannot be done."""
    modules: dict[str, Callable[[int], Any]] = {
        "automatic_optimization=False": Manual,
        "training_step": Own,
        "all of the loss into criterion": Scaled,
        "parameters outside of its model: temperature": Warm,
        "LBFGS": SecondOrder,
        "DualPipeLightningModule; found Unsplit": lambda _: Unsplit(),
        "num_microbatches": lambda _: Split(1),
    }
    module = modules.get(name, Split)(2 * size)
    callbacks = [WeightAveraging()] if name == "WeightAveraging" else []
    job = Run(options=REFUSED[name])
    trainer = make_trainer(job, callbacks, devices=size, strategy=DualPipeStrategy())
    is_padded = name == "choose reduction='token'"
    return attempt(trainer.fit, module, make_loader(8, 0, False, is_padded))
