"""Train a Llama with Hugging Face's trainer over a pipeline, beside the same training unsplit.

python examples/hf_trainer_example.py --num-gpus 2

The text is that of Python's own library. Where there are not so many GPUs, ranks are processes on
the CPU. ``torchrun --nproc-per-node 2 examples/hf_trainer_example.py`` trains over the pipeline
alone. Needs the extra: pip install '.[transformers]'
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dualpipe_ext.compat import DualPipeTrainer
from dualpipe_ext.testing import run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpt.data import draw_batch, load_corpus
from side_by_side import print_losses


@dataclass(frozen=True)
class Run:
    """What both trainings have in common."""

    layers: int
    width: int
    steps: int
    rows: int
    data: Path | None
    on_cpu: bool

    def model(self) -> LlamaForCausalLM:
        """A model of bytes; the same weights every time."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
        )
        return LlamaForCausalLM(config)

    def dataset(self) -> list[dict[str, Tensor]]:
        """Windows of text, which are their own labels: the model shifts them."""
        windows, _ = draw_batch(load_corpus(self.data).train, self.steps * self.rows, 64, 0)
        return [{"input_ids": window, "labels": window} for window in windows]

    def arguments(self, folder: str) -> TrainingArguments:
        """Those of any training."""
        return TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=self.rows,
            max_steps=self.steps,
            learning_rate=3e-3,
            warmup_steps=10,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            use_cpu=self.on_cpu,
            dataloader_pin_memory=not self.on_cpu,
        )


def losses_of(trainer: Any) -> list[float]:
    """Trains; returns the loss of each step."""
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def train_rank(rank: int, num_ranks: int, run: Run) -> list[float]:
    """One rank of the pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = DualPipeTrainer(
            model=run.model(),
            args=run.arguments(folder),
            train_dataset=run.dataset(),
            num_chunks=2 * num_ranks,
        )
        return losses_of(trainer)


def train_unsplit(run: Run) -> list[float]:
    """The same without a pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        return losses_of(Trainer(run.model(), run.arguments(folder), train_dataset=run.dataset()))


def main(
    num_gpus: Annotated[int, typer.Option(min=2, help="Ranks; an even number.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
    layers: Annotated[int, typer.Option(min=2, help="Transformer blocks.")] = 4,
    width: Annotated[int, typer.Option(min=4, help="Size of the hidden states.")] = 64,
    rows: Annotated[int, typer.Option(min=1, help="Sequences of a batch.")] = 32,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Python files to read, not the stdlib."),
    ] = None,
) -> None:
    """Train over a pipeline and in one piece, and compare the losses."""
    if "RANK" in os.environ:
        on_cpu = torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"])
        run = Run(layers, width, steps, rows, data, on_cpu)
        train_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), run)
        dist.destroy_process_group()
        return
    run = Run(layers, width, steps, rows, data, torch.cuda.device_count() < num_gpus)
    by_rank = run_ranks(train_rank, num_gpus, "processes", args=(run,))
    print_losses(by_rank[0], train_unsplit(run))


if __name__ == "__main__":
    typer.run(main)
