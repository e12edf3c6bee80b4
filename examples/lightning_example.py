"""Train on pictures with Lightning's ``Trainer`` over a pipeline, beside the same training unsplit.

python examples/lightning_example.py --num-gpus 2

The pictures are scikit-learn's digits. Where there are not so many GPUs, ranks are processes on the
CPU. ``torchrun --nproc-per-node 2 examples/lightning_example.py --num-gpus 2`` trains over the
pipeline alone. Needs the extra, and scikit-learn: pip install '.[lightning]' scikit-learn
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dualpipe_ext import setup_dual_pipe
from dualpipe_ext.compat import DualPipeLightningModule, DualPipeStrategy

sys.path.insert(0, str(Path(__file__).resolve().parent))
from side_by_side import print_losses


class Reader(nn.Module):
    """Reads the eight lines of a picture as eight tokens, and says which digit it shows."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) / 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, picture: Tensor) -> Tensor:
        """Scores of the ten digits for pictures of [rows, 8, 8]."""
        x = self.embedding(picture) + self.position
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x.mean(1))
        return scores


class Digits(DualPipeLightningModule):
    """The training over a pipeline."""

    def __init__(self, model: nn.Module, num_chunks: int) -> None:
        super().__init__(model=model, num_chunks=num_chunks)

    def configure_optimizers(self) -> Any:
        """An optimizer of this rank's stages."""
        return torch.optim.AdamW(self.dualpipe_wrapper.local_module.parameters(), lr=3e-3)

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A mean over rows."""
        return cross_entropy(outputs, targets)


class UnsplitDigits(LightningModule):  # type: ignore[misc]  # lightning may not be there to check
    """The same without a pipeline."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def configure_optimizers(self) -> Any:
        """An optimizer of all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = cross_entropy(self.model(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The loss of a batch that is not learned from."""
        self.log("val_loss", cross_entropy(self.model(batch[0]), batch[1]))


class Losses(Callback):  # type: ignore[misc]  # lightning may not be there to check
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.of_steps: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Reads what the step has logged."""
        self.of_steps.append(float(trainer.callback_metrics["train_loss"]))


@dataclass(frozen=True)
class Run:
    """What both trainings have in common."""

    layers: int
    width: int
    steps: int
    rows: int
    accelerator: str

    def model(self) -> Reader:
        """The same weights every time."""
        seed_everything(0, verbose=False)
        return Reader(self.layers, self.width)

    def loaders(self) -> tuple[Any, Any]:
        """Batches to learn from, in an order that is the same every time, and others."""
        pictures, digits = load_digits(return_X_y=True)
        data = TensorDataset(
            torch.tensor(pictures, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(digits)
        )
        train, held_out = torch.utils.data.random_split(
            data, [0.8, 0.2], generator=torch.Generator().manual_seed(1)
        )
        order = torch.Generator().manual_seed(2)
        return (
            DataLoader(train, self.rows, shuffle=True, generator=order),
            DataLoader(held_out, self.rows),
        )

    def fit(self, module: LightningModule, **options: Any) -> tuple[list[float], float]:
        """Trains; returns the loss of each step, and that of the pictures that were held out."""
        losses = Losses()
        trainer = Trainer(
            accelerator=self.accelerator,
            max_steps=self.steps,
            gradient_clip_val=1.0,
            callbacks=[losses],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        train, held_out = self.loaders()
        trainer.fit(module, train)
        (found,) = trainer.validate(module, held_out, verbose=False)
        return losses.of_steps, found["val_loss"]


def main(
    num_gpus: Annotated[int, typer.Option(min=2, help="Ranks; an even number.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 60,
    layers: Annotated[int, typer.Option(min=2, help="Transformer blocks.")] = 4,
    width: Annotated[int, typer.Option(min=4, help="Of the tokens; a multiple of 4.")] = 32,
    rows: Annotated[int, typer.Option(min=1, help="Pictures of a batch.")] = 64,
) -> None:
    """Train over a pipeline and in one piece, and compare the losses."""
    try:
        setup_dual_pipe(Reader(layers, width), num_stages=num_gpus)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    on_gpus = torch.cuda.device_count() >= num_gpus
    if not on_gpus:
        torch.set_num_threads(1)  # ranks share the cores
    run = Run(layers, width, steps, rows, "gpu" if on_gpus else "cpu")
    is_launched = "LOCAL_RANK" in os.environ  # this script again, as a rank
    unsplit = None if is_launched else run.fit(UnsplitDigits(run.model()), devices=1)
    ours = run.fit(
        Digits(run.model(), num_chunks=2 * num_gpus), devices=num_gpus, strategy=DualPipeStrategy()
    )
    if unsplit is not None:
        print_losses(ours[0], unsplit[0])
        print(f"held out: {ours[1]:.6f} over the pipeline, {unsplit[1]:.6f} in one piece")
    elif dist.get_rank() == 0:
        print(f"last loss: {ours[0][-1]:.6f}; held out: {ours[1]:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
