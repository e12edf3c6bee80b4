"""The code of the documents that this project began with, and ranks that run it.

As written there, but for the package's name and for what could not run: names that nobody defined
are arguments here, a loop of a comment has a step for its body, a model is one with a head.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

ADAPTERS = """
import torch
from dualpipe_ext import DualPipe, set_p2p_tensor_shapes, set_p2p_tensor_dtype
from dualpipe_ext.adapters import get_model_adapter

# Create your model
model = YourModel(...)

# Get the appropriate adapter for your model
adapter = get_model_adapter(model)

# Partition the model
partitions = adapter.partition(num_partitions=4)  # Must be even for DualPipe

# Set tensor shapes for communication
set_p2p_tensor_shapes([(batch_size, seq_len, hidden_size)])
set_p2p_tensor_dtype(torch.float32)

# Create DualPipe
local_rank = dist.get_rank()
local_module = partitions[local_rank].cuda()
dualpipe_model = DualPipe([local_module, local_module])

# Run the model
loss, outputs = dualpipe_model.step(inputs, num_chunks=8, criterion=your_loss_fn, labels=(labels,))
"""

CONFIGURATION = """
def setup_dual_pipe(model, num_stages):
    # Configure DualPipe for model
    config = {
        "num_stages": num_stages,
        "overlap_strategy": "full",
        "memory_optimization": "activation_checkpoint"
    }
    return DualPipeConfig(**config)
"""

PROFILING = """
from dualpipe_ext.utils import enable_profiling, get_profiler

# Enable profiling before your training loop
enable_profiling(log_dir="./profiles")

# Training loop
for epoch in range(epochs):
    for batch in dataloader:
        losses.append(training.train_step(batch))

# Get profiling results
profiler = get_profiler()
profiler.print_summary()
profiler.save_to_file("dualpipe_profile.json")
"""

LIGHTNING = """
from dualpipe_ext.compat import DualPipeLightningModule

class YourLightningModule(DualPipeLightningModule):
    def __init__(self, model, learning_rate=1e-3):
        super().__init__(model=model, num_chunks=8)
        self.learning_rate = learning_rate

    def configure_optimizers(self):
        return torch.optim.Adam(self.dualpipe_wrapper.local_module.parameters(), lr=self.learning_rate)

    def criterion(self, outputs, targets):
        return your_loss_function(outputs, targets)
"""

HUGGING_FACE = """
from transformers import AutoModelForCausalLM, TrainingArguments
from dualpipe_ext.compat import DualPipeTrainer

# Create a model
model = AutoModelForCausalLM.from_pretrained("your-model")

# Create training arguments
training_args = TrainingArguments(**arguments)

# Create DualPipe trainer
trainer = DualPipeTrainer(
    model=model,
    args=training_args,
    train_dataset=train_dataset,
    num_chunks=8,
    enable_profiling=True
)

# Train the model
trainer.train()
"""

VOCABULARY, WIDTH, TIME, ROWS = 11, 8, 5, 16


class Block(nn.Module):
    """One of many."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class YourModel(nn.Module):
    """Says of each token which one comes next."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), tokens.flatten())


def texts() -> tuple[Tensor, Tensor]:
    """Two halves of a batch; each token is followed by the one after it."""
    first = torch.randint(VOCABULARY, (2, ROWS, 1), generator=torch.Generator().manual_seed(1))
    halves = (first + torch.arange(TIME)) % VOCABULARY
    return halves[0], halves[1]


def following(text: Tensor) -> Tensor:
    return (text + 1) % VOCABULARY


def run_block(text: str, **names: Any) -> dict[str, Any]:
    """Runs a block with the names that it takes for granted; returns what it defined."""
    if not torch.cuda.is_available():
        text = text.replace(".cuda()", "")
    exec(compile(text, "a seed's block", "exec"), names)  # noqa: S102 - to run it is the test
    return names


def adapted_step(rank: int, size: int) -> Tensor | None:
    """The losses of the adapters' block."""
    down, up = texts()
    given = {0: down, size - 1: up}.get(rank)
    wanted = {0: following(up), size - 1: following(down)}.get(rank)
    loss: Tensor | None = run_block(
        ADAPTERS,
        YourModel=YourModel,
        dist=dist,
        your_loss_fn=loss_of,
        batch_size=ROWS // 4,
        seq_len=TIME,
        hidden_size=WIDTH,
        inputs=given,
        labels=wanted,
    )["loss"]
    return loss


def profiled_training(size: int) -> tuple[list[Tensor], dict[str, Any]]:
    """The losses of the integration guide's training, and what its process wrote of its times."""
    from dualpipe_ext import DualPipeConfig, TrainingWrapper

    model = YourModel()
    setup_dual_pipe = run_block(CONFIGURATION, DualPipeConfig=DualPipeConfig)["setup_dual_pipe"]
    dualpipe_config = setup_dual_pipe(model, size)
    losses: list[Tensor] = []
    text = torch.cat(texts())
    run_block(
        PROFILING,
        training=TrainingWrapper(model, dualpipe_config),
        epochs=2,
        dataloader=[(text, following(text))] * 3,
        losses=losses,
    )
    name = f"dualpipe_profile{f'.rank{dist.get_rank()}' if dist.get_rank() else ''}.json"
    return losses, json.loads(Path("profiles", name).read_text())


def run_core(rank: int, size: int, folder: str) -> tuple[Any, Any, Any]:
    """What needs nothing but torch."""
    os.chdir(folder)
    return adapted_step(rank, size), *profiled_training(size)


def lightning_losses(size: int) -> list[float]:
    """The loss of each step of the Lightning module."""
    from lightning.pytorch import Callback, Trainer

    from dualpipe_ext.compat import DualPipeStrategy

    class Losses(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            found.append(float(trainer.callback_metrics["train_loss"]))

    found: list[float] = []
    names = run_block(LIGHTNING, torch=torch, your_loss_function=loss_of)
    text = torch.cat(texts())
    trainer = Trainer(
        accelerator="cpu",
        devices=size,
        strategy=DualPipeStrategy(),
        max_epochs=6,
        callbacks=[Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(text, following(text)), batch_size=len(text))
    trainer.fit(names["YourLightningModule"](YourModel()), data)
    return found


def hugging_face_job(folder: str) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """The settings and the data of the Hugging Face block."""
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": 16,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return arguments, [{"input_ids": text, "labels": text} for text in torch.cat(texts())]


def hugging_face_log(folder: str) -> list[dict[str, float]]:
    """What the trainer logged; the model is read from a folder named as in the block."""
    arguments, dataset = hugging_face_job(folder)
    names = run_block(HUGGING_FACE, arguments=arguments, train_dataset=dataset)
    log: list[dict[str, float]] = names["trainer"].state.log_history
    return log


def run_trainers(rank: int, size: int, folder: str) -> tuple[list[float], list[dict[str, float]]]:
    """What needs other libraries, on a rank that was started as torchrun does."""
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test"}
    return lightning_losses(size), hugging_face_log(folder)
